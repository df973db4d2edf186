"""Roles on one base: what is active, what gets gradients, and what gradient checkpointing recomputes."""

import contextlib
import copy

import pytest
import torch
from distill_setup import PROMPTS, distance
from peft import LoraConfig
from sft_setup import SIZE
from tiny_pipelines import tiny_wan_transformer, wan

from vidtrl.models import VideoModel
from vidtrl.models.causal import CausalAttention, KVCache
from vidtrl.models.roles import Roles, checkpoint_under
from vidtrl.trainer.lora import add_lora, load_base_adapters, save_adapter


def randomize(parameters: dict, seed: int) -> None:
    """Fresh adapters do nothing; give them something to do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


class Setup:
    """A tiny model with student, fake score and teacher."""

    def __init__(self, pipe=None, below=()):
        self.model = VideoModel(wan()[0] if pipe is None else pipe)
        self.condition = self.model.condition(PROMPTS[:2], **SIZE)
        self.x = torch.randn(2, *self.condition.latent_shape, generator=torch.Generator().manual_seed(0))
        self.peft = add_lora(self.model.denoisers["transformer"], LoraConfig(r=4, lora_alpha=8))
        self.peft.add_adapter("fake", copy.deepcopy(self.peft.peft_config["default"]))
        self.roles = Roles()
        for name, adapter, trained in (
            ("student", ("default",), True),
            ("fake", ("fake",), True),
            ("teacher", (), False),
        ):
            self.roles.add(name, self.peft, (*below, *adapter), trained=trained)
        for seed, name in enumerate(("student", "fake")):
            randomize(self.roles.parameters(name), seed)

    def velocity(self, role, x=None, sigma=0.7, frozen=False):
        with self.roles.active(role, frozen=frozen) as denoiser:
            return self.model.velocity(self.x if x is None else x, sigma, self.condition, denoiser=denoiser)

    def gradients(self, role) -> dict:
        return {name: p.grad for name, p in self.roles.parameters(role).items() if p.grad is not None}

    def clear(self):
        self.peft.zero_grad()


@pytest.fixture
def setup():
    return Setup()


def test_each_role_has_its_own_output_and_the_teacher_is_the_base(setup):
    plain = VideoModel(wan()[0])
    with torch.no_grad():
        outputs = {role: setup.velocity(role) for role in ("student", "fake", "teacher")}
        expected = plain.velocity(setup.x, 0.7, setup.condition)
    assert torch.equal(outputs["teacher"], expected)
    for a, b in (("student", "fake"), ("student", "teacher"), ("fake", "teacher")):
        assert (outputs[a] - outputs[b]).abs().max() > 1e-3


def test_only_the_active_role_requires_gradients(setup):
    def trainable():
        return {name for name, p in setup.peft.named_parameters() if p.requires_grad}

    student, fake = (set(setup.roles.parameters(role)) for role in ("student", "fake"))
    assert student and fake and not student & fake
    assert trainable() == student  # the first one that was added
    with setup.roles.active("fake"):
        assert trainable() == fake
        with setup.roles.active("student", frozen=True):
            assert not trainable() and (setup.roles.current, setup.roles.frozen) == ("student", True)
            with setup.roles.active("teacher"):
                assert not trainable()
            with setup.roles.active("student"):
                assert trainable() == student
            assert not trainable()
        assert trainable() == fake
    assert trainable() == student
    with setup.roles.training():
        assert trainable() == student | fake
    assert trainable() == student
    with setup.roles.active("fake", frozen=True):
        with setup.roles.training("student"):
            assert trainable() == student
        assert not trainable()


def test_the_role_before_comes_back_after_an_error(setup):
    with pytest.raises(KeyError), setup.roles.active("fake"):
        raise KeyError
    assert setup.roles.current == "student"
    assert all(p.requires_grad for p in setup.roles.parameters("student").values())
    setup.roles.require("student")


def test_backward_under_a_wrong_role_raises(setup):
    setup.roles.require("student")
    with setup.roles.active("fake"), pytest.raises(RuntimeError, match="backward for the role 'student' while 'fake'"):
        setup.roles.require("student")
    with setup.roles.active("student", frozen=True), pytest.raises(RuntimeError, match=r"while 'student' \(frozen\)"):
        setup.roles.require("student")


def test_missing_and_foreign_gradients_raise(setup):
    with pytest.raises(RuntimeError, match="'student' got no gradient in a step for student"):
        setup.roles.check_gradients("student")
    setup.velocity("student").sum().backward()
    setup.roles.check_gradients("student")
    with pytest.raises(RuntimeError, match="'student' has gradients in a step that trains fake"):
        setup.roles.check_gradients("fake")
    with setup.roles.active("fake"):
        setup.velocity("fake").sum().backward()
    setup.roles.check_gradients("student", "fake")


def test_a_frozen_role_passes_gradients_to_its_input_and_gets_none(setup):
    x = setup.x.clone().requires_grad_()
    setup.velocity("fake", x, frozen=True).square().sum().backward()
    assert x.grad.abs().max() > 0 and not setup.gradients("fake") and not setup.gradients("student")
    y = setup.x.clone().requires_grad_()
    with setup.roles.active("fake"):
        setup.velocity("fake", y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert setup.gradients("fake")


def step(setup, checkpointing):
    """A backward pass of the student and one of the fake score, each with another role's forward inside."""
    transformer = setup.model.denoisers["transformer"]
    if checkpointing:
        transformer.enable_gradient_checkpointing(
            *([checkpoint_under(setup.roles)] if checkpointing == "roles" else [])
        )
    setup.clear()
    result = {}
    for role in ("student", "fake"):
        with setup.roles.active(role):
            x = setup.x - 0.7 * setup.velocity(role)
            with torch.no_grad():
                setup.velocity("teacher", x)
            loss = (x * setup.velocity("fake" if role == "student" else "student", x, frozen=True)).sum()
            loss.backward()  # through both roles, while one of them is active
        result |= {name: g.clone() for name, g in setup.gradients(role).items()}
    return result


def test_checkpointing_recomputes_under_the_role_of_the_forward():
    plain, ours = step(Setup(), None), step(Setup(), "roles")
    assert plain.keys() == ours.keys() and len(plain) == 80
    assert distance(plain, ours) == 0


def input_gradient(checkpointing):
    """Of a student's forward, while another role is active in the backward pass."""
    setup, x = Setup(), None
    transformer = setup.model.denoisers["transformer"]
    if checkpointing:
        transformer.enable_gradient_checkpointing(
            *([checkpoint_under(setup.roles)] if checkpointing == "roles" else [])
        )
    x = setup.x.clone().requires_grad_()
    output = setup.velocity("student", x)
    with setup.roles.active("fake"):
        output.square().sum().backward()
    return x.grad


def test_default_checkpointing_is_silently_wrong():
    plain, ours, default = (input_gradient(kind) for kind in (None, "roles", "default"))
    assert torch.equal(plain, ours)
    assert (plain - default).norm() > 0.05 * plain.norm()  # what checkpoint_under is for


def test_checkpointing_with_a_cache_and_roles():
    """The recomputation finds the causal mode and the cached past of its forward pass."""
    found = {}
    for checkpointing in (False, True):
        setup = Setup()
        causal = CausalAttention(setup.model)
        if checkpointing:
            function = checkpoint_under(setup.roles, causal)
            setup.model.denoisers["transformer"].enable_gradient_checkpointing(function)
        cache = KVCache()
        with torch.no_grad(), causal.cached(cache, store=True):
            setup.velocity("student", setup.x[:, :, :1], 0.0)
        with causal.cached(cache):
            loss = setup.velocity("student", setup.x[:, :, 1:2]).square().sum()
        with torch.no_grad(), causal.cached(cache, store=True):
            setup.velocity("fake", setup.x[:, :, 1:2], 0.0)  # the cache goes on before backward
        loss.backward()
        found[checkpointing] = setup.gradients("student")
    assert len(found[True]) == 40 and distance(found[False], found[True]) == 0


def test_separate_modules_as_roles():
    roles, modules = Roles(), [tiny_wan_transformer(seed=i) for i in range(3)]
    roles.add("student", modules[0], trained=True)
    roles.add("fake", modules[1], trained=True)
    roles.add("teacher", modules[2].requires_grad_(False))
    with roles.active("fake") as module:
        assert module is modules[1]
        assert [any(p.requires_grad for p in m.parameters()) for m in modules] == [False, True, False]
    assert [all(p.requires_grad for p in m.parameters()) for m in modules] == [True, False, False]
    with roles.active("fake", frozen=True):
        assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_the_active_role_again_works_inside_torch_func(setup):
    """PEFT's switches may not run inside a functional transform."""

    def function(x):
        return setup.velocity("student", x)

    with torch.no_grad():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            _, derivative = torch.func.jvp(function, (setup.x,), (torch.ones_like(setup.x),))
    assert derivative.abs().max() > 0


# ---- Adapters of earlier stages ----


@pytest.fixture
def policies(tmp_path):
    """Two directories with adapters, as earlier stages leave them."""
    folders = []
    for seed, rank in ((10, 4), (11, 2)):
        model = add_lora(wan()[0].transformer, LoraConfig(r=rank, lora_alpha=8))
        randomize({n: p for n, p in model.named_parameters() if p.requires_grad}, seed)
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        save_adapter(model, folders[-1])
    return [str(folder) for folder in folders]


def test_base_adapters_stay_under_every_role(policies):
    pipe = wan()[0]
    load_base_adapters(pipe, ["transformer"], policies)
    below = ("base_0", "base_1")
    setup = Setup(pipe, below)
    assert setup.roles.adapters("teacher") == below and setup.roles.adapters("fake") == (*below, "fake")
    before = {n: p.detach().clone() for n, p in setup.peft.named_parameters() if ".base_" in n}
    with torch.no_grad():
        outputs = {role: setup.velocity(role) for role in ("student", "fake", "teacher")}
    merged = wan()[0]
    for i, folder in enumerate(policies):
        merged.load_lora_weights(folder, adapter_name=f"policy_{i}")
    merged.set_adapters(["policy_0", "policy_1"])
    merged.fuse_lora(adapter_names=["policy_0", "policy_1"])
    merged.unload_lora_weights()
    expected = VideoModel(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            outputs["teacher"], expected.velocity(setup.x, 0.7, setup.condition), rtol=0, atol=1e-5
        )
    without = VideoModel(wan()[0]).velocity(setup.x, 0.7, setup.condition)
    assert (outputs["teacher"] - without).abs().max() > 0.1  # control
    assert (outputs["teacher"] - outputs["fake"]).abs().max() > 1e-2
    setup.velocity("student").sum().backward()
    assert setup.gradients("student") and before
    for name, parameter in setup.peft.named_parameters():
        if ".base_" in name and ".base_layer" not in name:
            assert parameter.grad is None and not parameter.requires_grad and torch.equal(parameter, before[name])


def test_a_role_that_is_added_later_knows_new_adapters(setup):
    config = LoraConfig(r=2, target_modules=["to_q"])
    setup.peft.add_adapter("late", config)
    setup.roles.add("late", setup.peft, ("late",), trained=True)
    assert setup.roles.current == "student"
    assert not any(p.requires_grad for p in setup.roles.parameters("late").values())
    with setup.roles.active("late"), contextlib.nullcontext():
        setup.velocity("late").sum().backward()
    assert setup.gradients("late") and not setup.gradients("student")
