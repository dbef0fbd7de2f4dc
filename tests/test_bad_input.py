"""What is given wrongly raises the documented error, before anything is computed, and breaks nothing.

Each message has to say what was found and what to do. After each error the U-Net, the base and the plan still work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import UNet2DModel

from fisedit_compile import SparsityConfig, sparsify
from fisedit_compile.errors import BaseMismatchError, CaptureError, FiseditError, MaskError, SparsifyError

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SIZE = 2, (16, 16)


@dataclass
class Session:
    """A U-Net with a recorded base and a plan, and the step that they gave before anything went wrong."""

    unets: UNets
    sparse: Any
    call: Any
    args: tuple[torch.Tensor, ...]
    cache: dict[Any, torch.Tensor]
    plan: Any
    out: torch.Tensor

    def of(self, batch: int = BATCH, size: tuple[int, int] = SIZE, attention: str = "full") -> tuple[Any, Any, Any]:
        """(sparse U-Net, call, cache) of another kind than this session's."""
        sparse = self.unets.sparse("micro", torch.float64, attention, 4)
        base = self.unets.recorded(sparse, "micro", batch, size)
        return sparse, base.call, base.cache


@pytest.fixture(scope="module")
def _session(unets: UNets) -> Session:
    sparse = unets.sparse("micro", torch.float64, "full", 4)
    base = unets.recorded(sparse, "micro", BATCH, SIZE)
    plan = sparse.prepare(base.call, everything())
    out = sparse.step(base.call, base.cache, plan)
    return Session(unets, sparse, base.call, unets.inputs("micro", BATCH, SIZE)[0], base.cache, plan, out)


@pytest.fixture
def session(_session: Session) -> Iterator[Session]:
    """Whatever a test does with it, the session works afterwards as it did before."""
    yield _session
    assert torch.equal(_session.sparse.step(_session.call, _session.cache, _session.plan), _session.out)


def everything(n: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.ones(n, *size, dtype=torch.bool)


def unet_2d() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )


class TestModel:
    @pytest.mark.parametrize(
        ("model", "name"),
        [(lambda: torch.nn.Linear(1, 1), "Linear"), (unet_2d, "UNet2DModel"), (lambda: None, "NoneType")],
    )
    def test_another_class(self, model: Callable[[], Any], name: str) -> None:
        with pytest.raises(CaptureError, match=f"UNet2DConditionModel, not a {name}: pass pipe.unet"):
            sparsify(model())

    def test_sparsified_twice(self, session: Session) -> None:
        for again in (session.sparse, torch.compile(session.sparse)):
            with pytest.raises(CaptureError, match="sparse already: pass the original, or use it as it is"):
                sparsify(again)

    def test_a_compiled_unet_is_taken(self, session: Session) -> None:
        assert sparsify(torch.compile(session.sparse.unet)).config is session.sparse.config

    def test_training_mode_is_refused_until_eval(self, session: Session) -> None:
        unet = session.unets.fresh("micro")
        sparse = sparsify(unet.train(), {"dense_below": 4})
        call = sparse.call(*session.args)
        for refused in (lambda: sparse.record(call), lambda: sparse.prepare(call, everything())):
            with pytest.raises(CaptureError, match=r"training mode: call unet\.eval\(\) first"):
                refused()
        assert sparse(*session.args).sample.shape == session.out.shape  # dense calls train as ever
        unet.eval()
        _, cache = sparse.record(call)
        plan = sparse.prepare(call, everything())
        unet.train()
        with pytest.raises(CaptureError, match="training mode"):
            sparse.step(call, cache, plan)

    def test_what_cannot_be_captured_says_why_and_what_to_do(self, session: Session) -> None:
        unet = session.unets.fresh("micro")
        unet.conv_in.register_forward_hook(lambda module, args, out: out * float(out.abs().sum()))
        sparse = sparsify(unet)
        with pytest.raises(CaptureError, match=r"(?s)could not be exported.*hook .* of conv_in: take it off"):
            sparse.record(sparse.call(*session.args))

    def test_nothing_large_enough_to_be_sparse(self, session: Session) -> None:
        sparse = sparsify(session.sparse.unet, {"dense_below": 64})
        with pytest.raises(
            SparsifyError, match=r"64 or more latent cells a\s+side; lower dense_below, or edit a larger"
        ):
            sparse.record(sparse.call(*session.args))


class TestConfig:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"atention": "full"}, "unknown config field.* atention: known are attention, blocks, cache, compile, "),
            ({"attention": "some"}, "attention='some': choose 'full' or 'masked'"),
            ({"attention": None}, "attention=None: choose"),
            ({"blocks": "large"}, "blocks='large': choose 'pixel', 'paper' or 'measured'"),
            ({"dense_below": 0}, "dense_below=0: give a number of latent cells, at least 1"),
            ({"dense_below": 2.5}, "dense_below=2.5: give a number"),
            ({"dense_steps": -1}, "dense_steps=-1: an int >= 0, or a float in"),
            ({"dense_steps": 1.0}, "dense_steps=1.0: an int >= 0, or a float in"),
            ({"dense_steps": float("nan")}, "dense_steps=nan"),
            ({"dense_steps": True}, "dense_steps=True: give a count"),
            ({"dense_steps": "10"}, "dense_steps='10': give a count"),
            ({"cross_replace": 1.5}, "cross_replace=1.5: 'auto', or a share of the steps in"),
            ({"cross_replace": float("nan")}, "cross_replace=nan"),
            ("full", "config is a str: give a SparsityConfig or a dict of its fields"),
            ([("attention", "full")], "config is a list: give"),
        ],
        ids=str,
    )
    def test_unknown_fields_and_values(self, session: Session, config: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sparsify(session.sparse.unet, config)

    @pytest.mark.parametrize("config", [{"cross_replace": "0.5"}, {"compile": "yes"}, {"dense_below": True}], ids=str)
    def test_values_of_another_type(self, session: Session, config: dict[str, Any]) -> None:
        (field,) = config
        with pytest.raises(ValueError, match=f"{field}="):
            sparsify(session.sparse.unet, config)

    def test_a_config_checks_itself(self) -> None:
        with pytest.raises(ValueError, match="blocks='none'"):
            SparsityConfig(blocks="none")  # type: ignore[arg-type]
        assert SparsityConfig.of(None) == SparsityConfig.of({}) == SparsityConfig()


class TestInputs:
    @pytest.mark.parametrize(
        ("latents", "found"),
        [
            (lambda x: x[0], r"\[4, 16, 16\]"),
            (lambda x: x[None], r"\[1, 2, 4, 16, 16\]"),
            (lambda x: x.long(), r"\[2, 4, 16, 16\]"),
            (lambda x: x.tolist(), "list"),
            (lambda x: None, "NoneType"),
        ],
        ids=["rank 3", "rank 5", "integers", "list", "none"],
    )
    def test_latents_of_another_kind(self, session: Session, latents: Callable[..., Any], found: str) -> None:
        sample, *rest = session.args
        with pytest.raises(CaptureError, match=rf"sample is .*{found}.*has to be latents \[batch, channels, h, w\]"):
            session.sparse.call(latents(sample), *rest)

    def test_latents_of_other_channels(self, session: Session) -> None:
        sample, *rest = session.args
        call = session.sparse.call(sample[:, :3], *rest)
        for refused in (lambda: session.sparse.record(call), lambda: session.sparse.prepare(call, everything())):
            with pytest.raises(CaptureError, match="latents of 3 channels: this U-Net takes 4"):
                refused()

    @pytest.mark.parametrize("kwargs", [{"timesteps": 3}, {"cross_attention": 1}])
    def test_arguments_that_the_unet_does_not_take(self, session: Session, kwargs: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            session.sparse.call(*session.args, **kwargs)

    def test_arguments_that_are_missing(self, session: Session) -> None:
        with pytest.raises(TypeError, match="missing a required argument: 'encoder_hidden_states'"):
            session.sparse.call(*session.args[:2])

    def test_another_dtype_than_the_weights(self, session: Session) -> None:
        sample, timestep, text = session.args
        with pytest.raises(CaptureError, match=r"(?s)could not be exported as one graph: .*float.*double"):
            session.sparse.record(session.sparse.call(sample.float(), timestep, text.float()))


class TestMask:
    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (everything(1, (8, 8)), r"mask of \(8, 8\) for latents of \(16, 16\): resize it first"),
            (everything(1, (16, 8)), r"mask of \(16, 8\) for latents of \(16, 16\): resize it first"),
            (everything()[0], r"shape \[16, 16\]; give \[samples, height, width\]"),
            (everything()[None], r"shape \[1, 1, 16, 16\]; give \[samples, height, width\]"),
            (everything(0), r"shape \[0, 16, 16\]; give \[samples, height, width\], none of them zero"),
            (everything().float(), r"dtype torch.float32; give a bool tensor, for example `mask > 0\.5`"),
            (everything().long(), "dtype torch.int64; give a bool tensor"),
            (everything().float() * torch.nan, "dtype torch.float32; give a bool tensor"),
            (everything(3), "batch of 2 is not a multiple of the 3 masks; give one mask a sample .*, or one for all"),
            (everything(4), "batch of 2 is not a multiple of the 4 masks"),
        ],
        ids=["small", "narrow", "rank 2", "rank 4", "no sample", "float", "int", "nan", "3 samples", "4 samples"],
    )
    def test_of_another_kind(self, session: Session, mask: torch.Tensor, message: str) -> None:
        with pytest.raises(MaskError, match=message) as error:
            session.sparse.prepare(session.call, mask)
        assert isinstance(error.value, ValueError)

    @pytest.mark.parametrize("mask", [None, [[True]], everything().numpy()], ids=["none", "list", "numpy"])
    def test_that_is_no_tensor(self, session: Session, mask: Any) -> None:
        with pytest.raises(MaskError, match="give a bool tensor"):
            session.sparse.prepare(session.call, mask)


class TestBase:
    def test_a_cache_of_another_config(self, session: Session) -> None:
        """With masked attention no keys and values are kept."""
        _, _, cache = session.of(attention="masked")
        with pytest.raises(
            BaseMismatchError, match=r"holds nothing for .* more: record the call with this U-Net and this"
        ):
            session.sparse.step(session.call, cache, session.plan)

    def test_a_cache_that_holds_more_is_fine(self, session: Session) -> None:
        masked, call, cache = session.of(attention="masked")
        plan = masked.prepare(call, everything())
        assert torch.equal(masked.step(call, session.cache, plan), masked.step(call, cache, plan))

    def test_a_cache_for_other_steps(self, session: Session) -> None:
        _, attention_maps = session.sparse.record(session.call, activations=False, attention=True)
        for cache in ({}, attention_maps):
            with pytest.raises(BaseMismatchError, match=f"and {len(session.cache) - 1} more: record the call"):
                session.sparse.step(session.call, cache, session.plan)

    @pytest.mark.parametrize("kind", ["batch", "size", "size of as many pixels", "dtype"])
    def test_a_cache_of_another_call(self, session: Session, kind: str) -> None:
        if kind == "dtype":
            cache = {entry: kept.float() for entry, kept in session.cache.items()}
        else:
            other = {"batch": (1, SIZE), "size": (2, (13, 10)), "size of as many pixels": (2, (8, 32))}[kind]
            _, _, cache = session.of(*other)
        with pytest.raises(BaseMismatchError):
            session.sparse.step(session.call, cache, session.plan)

    @pytest.mark.parametrize("kind", ["batch", "size", "config", "no plan"])
    def test_a_plan_of_another_call(self, session: Session, kind: str) -> None:
        if kind == "no plan":
            plan = everything()
        else:
            batch, size, attention = {
                "batch": (1, SIZE, "full"),
                "size": (2, (13, 10), "full"),
                "config": (2, SIZE, "masked"),
            }[kind]
            sparse, call, _ = session.of(batch, size, attention)
            plan = sparse.prepare(call, everything(1, size))
        with pytest.raises((FiseditError, ValueError), match="plan"):
            session.sparse.step(session.call, session.cache, plan)

    @pytest.mark.parametrize("samples", [0, BATCH + 1, -1])
    def test_samples_that_the_batch_does_not_have(self, session: Session, samples: int) -> None:
        with pytest.raises(ValueError, match="samples"):
            session.sparse.record(session.call, samples=samples, attention=True)
