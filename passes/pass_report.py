"""What a pass did and what it left as it was, with the module of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True)
class Skip:
    """A node that a pass could have rewritten and did not."""

    module_path: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module_path or '(U-Net)'}: {self.op}: {self.reason}"


@dataclass(frozen=True)
class Change:
    """A node that a pass annotated or rewrote."""

    module_path: str
    op: str


@dataclass
class PassReport:
    """The outcome of one pass: which nodes it changed, which it skipped and why, and its time."""

    name: str
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def changed(self) -> int:
        """How many nodes the pass changed."""
        return len(self.changes)

    def change(self, node: Node) -> None:
        """Record that ``node`` was annotated or rewritten."""
        self.changes.append(Change(node.meta.get("module_path", ""), str(node.target)))

    def skip(self, node: Node, reason: str) -> None:
        """Record that ``node`` was left as it is."""
        self.skipped.append(Skip(node.meta.get("module_path", ""), str(node.target), reason))

    def __str__(self) -> str:
        return f"{self.name}: {self.changed} changed, {len(self.skipped)} skipped, {self.seconds * 1e3:.0f} ms"
