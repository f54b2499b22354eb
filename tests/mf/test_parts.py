# SPDX-License-Identifier: Apache-2.0
"""The parts that MindFormers sees of us, one by one."""

import copy
import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindformers.core import build_optim
from mindformers.models import build_model_config, build_network
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn
from mindspore.train import RunContext
from mindspore.train.callback._callback import InternalCallbackParam

from mindformers_ext.core.config.file import parse_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, Family
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.jobs.train.hooks import QuietHook, hook_state
from mindformers_ext.mf import load_monitor, register  # what a plain MindFormers run imports
from mindformers_ext.mf.adapt import adapt
from mindformers_ext.mf.checkpoint import WholeCheckpointMonitor
from mindformers_ext.mf.hooks import DropoutSeeds, HookCallback
from mindformers_ext.mf.monitor import MoELossMonitor
from mindformers_ext.mf.pipeline_step import norm_tells_overflow
from mindformers_ext.mf.pruning import MaskInputs
from mindformers_ext.mf.rules import experts_without_sequence_parallel
from mindformers_ext.mf.run import seed_draws
from mindformers_ext.mf.step import copies_of
from mindformers_ext.mf.trainer import PortableCausalLanguageModelingTrainer, fill_base, seed_of, stand_ins
from mindformers_ext.ms.causal_lm import build_causal_lm
from tests.helpers.tiny_run import YAML


def config(**changes):
    return parse_yaml(YAML, "test") | changes


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_state_adam_weight_decay(dtype, decay):
    start, grads = np.array([[0.5, -2.0]], np.float32), np.array([[0.1, -0.3]], np.float32)
    parameter = Parameter(Tensor(start, dtype), name="w")
    optimizer = build_optim(
        {
            "type": "FP32StateAdamWeightDecay",
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "learning_rate": 0.1,
            "weight_decay": decay,
        },
        {"params": [parameter]},
    )
    assert optimizer.moments1[0].dtype == ms.float32 and optimizer.moments2[0].name == "adam_v.w"
    weight, m, v = start.astype(np.float64), 0.0, 0.0
    for step in range(1, 4):
        gradient = grads * step
        optimizer((Tensor(gradient, dtype),))
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight = weight - 0.1 * (m / (np.sqrt(v) + 1e-8) + decay * weight)
    tolerance = 1e-5 if dtype == ms.float32 else 5e-3
    np.testing.assert_allclose(parameter.asnumpy(), weight, rtol=tolerance)


def test_fp32_state_adam_weight_decay_refuses_wrong_values():
    with pytest.raises(UserError, match=r"beta1=1.5.*\n.*eps=0"):
        build_optim(
            {"type": "FP32StateAdamWeightDecay", "beta1": 1.5, "eps": 0.0},
            {"params": [Parameter(Tensor([1.0]), name="w")]},
        )


def test_an_older_yaml_becomes_ours_and_stays_as_it_was():
    before = config()
    result, notes = adapt(before, "CPU")
    assert before == config()
    assert result["model"]["model_config"]["type"] == "MixtralConfig"
    assert result["model"]["arch"]["type"] == "MixtralForCausalLM"
    assert result["runner_wrapper"]["type"] == "PortableTrainOneStepCell"
    assert result["trainer"]["type"] == "PortableCausalLanguageModelingTrainer"
    assert result["runner_config"]["sink_mode"] is False
    assert result["optimizer"]["type"] == "FusedAdamW"
    assert len([note for note in notes if "num_parallel_workers" not in note]) == 6


@pytest.mark.parametrize(
    ("device", "arch"),
    [("CPU", "PortableLlamaForCausalLM"), ("GPU", "PortableLlamaForCausalLM"), ("Ascend", "LlamaForCausalLM")],
)
def test_a_dense_yaml_is_left_to_mindformers_where_that_runs(device, arch):
    result, notes = adapt(config(moe_config=None), device)
    assert result["model"]["arch"]["type"] == arch
    assert (result["trainer"]["type"] == "CausalLanguageModelingTrainer") == (device == "Ascend")
    assert any(device in note for note in notes) == (device != "Ascend")


def test_a_dense_yaml_with_masks_is_ours_on_ascend_and_does_not_sink():
    written = config(moe_config=None)
    written["model"]["model_config"]["l0_module"] = {"target_sparsity": 0.5}
    result, notes = adapt(written, "Ascend")
    assert result["model"]["arch"]["type"] == "PortableLlamaForCausalLM" and not result["runner_config"]["sink_mode"]
    assert any("it has masks" in note for note in notes) and any("noise of the masks" in note for note in notes)


@pytest.mark.parametrize(
    ("mode", "stages", "copies"), [("semi_auto_parallel", 1, 8), ("semi_auto_parallel", 2, 4), ("data_parallel", 1, 1)]
)
def test_every_device_of_a_cut_graph_has_a_copy_of_the_loss(mode, stages, copies):
    assert copies_of(ParallelSpec(parallel_mode=mode, device_num=8, pipeline_stage=stages)) == copies


def plain_network(**changes):
    """The network as a plain MindFormers run builds it, from our registered names."""
    from mindformers.core.parallel_config import build_parallel_config

    full = MindFormerConfig(**config(**changes))
    full.model.model_config.type, full.model.arch.type = "MixtralConfig", "MixtralForCausalLM"
    build_parallel_config(full)
    return build_network(
        full.model, default_args={"parallel_config": full.parallel_config, "moe_config": full.moe_config}
    )


def test_a_plain_mindformers_run_builds_the_same_network():
    network = plain_network()
    spec = network_spec_from_yaml(config())
    assert network.spec.model == spec.model
    ours = {parameter.name: parameter.shape for parameter in build_causal_lm(spec).get_parameters()}
    assert {parameter.name: parameter.shape for parameter in network.get_parameters()} == ours
    assert "model.layers.0.feed_forward.ffn.w1.weight" in ours


@pytest.mark.slow
def test_training_returns_the_loss_until_the_terms_are_asked_for():
    network = plain_network()
    network.set_train(True)
    ids = Tensor(np.random.default_rng(0).integers(5, 390, (2, 33)), ms.int32)
    loss = network(ids)
    assert loss.shape == ()
    terms = plain_network()
    ms.load_param_into_net(terms, network.parameters_dict())
    terms.report_terms()
    terms.set_train(True)
    values = terms(ids)
    assert len(values) == 5 and float(values[0]) == pytest.approx(float(loss), abs=1e-6)


def test_mixtral_without_experts_is_refused():
    with pytest.raises(UserError, match="needs experts"):
        plain_network(moe_config={"expert_num": 1})


def test_callbacks_are_ours_only_inside():
    kind, name = MindFormerModuleType.CALLBACK, "MFLossMonitor"
    before = MindFormerRegister.get_cls(kind, name)
    with pytest.raises(RuntimeError), stand_ins():
        assert MindFormerRegister.get_cls(kind, name).__name__ == "MoELossMonitor"
        raise RuntimeError
    assert MindFormerRegister.get_cls(kind, name) is before


def test_the_norm_tells_overflow_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert norm_tells_overflow({"use_clip_grad": True, "local_norm": False}, {"calculate_per_token_loss": False})
    assert not norm_tells_overflow({"use_clip_grad": False}, {})
    assert not norm_tells_overflow({"local_norm": True}, {})
    assert not norm_tells_overflow({}, {"use_skip_data_by_global_norm": True})
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")  # no infinity is left behind
    assert not norm_tells_overflow({}, {})


def test_mindformers_builds_the_very_spec_that_the_checks_made(tmp_path, monkeypatch):
    """Through the file that MindFormers reads; nothing is read a second time. A file changed by hand is."""
    from mindformers_ext.core.cluster.build import build_spec_from_yaml
    from mindformers_ext.jobs.run.checks import check_run
    from mindformers_ext.mf import config as mf_config
    from mindformers_ext.mf.run import prepare

    elsewhere = {"data_loader": {"type": "Elsewhere"}}  # is nothing that the checks could open
    words = config(output_dir=str(tmp_path), recompute_config={"recompute": [1]}, train_dataset=elsewhere)
    checked = check_run(words, "test")
    build, read = checked.build, []
    monkeypatch.setattr(mf_config, "build_spec_from_yaml", lambda *g: read.append(g) or build_spec_from_yaml(*g))
    sections = prepare(checked.config, checked).model
    made, copied = (build_model_config(words.model_config) for words in (sections, copy.deepcopy(sections)))
    assert made.network_spec(1) is copied.network_spec(1) is build.network and not read
    assert made.recompute_spec() is build.recompute and made.lora() is None
    sections.model_config.network_yaml.model.model_config.num_layers = 3
    assert build_model_config(sections.model_config).network_spec(1).model.num_hidden_layers == 3
    assert made.network_spec(1) is build.network and len(read) == 1
    made.save_pretrained(str(tmp_path), save_json=True)
    assert json.loads((tmp_path / "config.json").read_text())["network_yaml"]["recompute_config"] == {"recompute": [1]}


def test_every_family_has_classes_and_one_that_is_added_gets_them(monkeypatch):
    added = Family(name="tiny", hf_class="TinyForCausalLM", yaml_names=(("TinyConfig", "TinyForCausalLM"),))
    monkeypatch.setitem(FAMILIES, "tiny", added)
    monkeypatch.setattr(register, "CLASSES", dict(register.CLASSES))
    register.register_families()
    for family in FAMILIES.values():
        for config_name, name in family.yaml_names:
            made = MindFormerRegister.get_cls(MindFormerModuleType.CONFIG, config_name)
            network_class = MindFormerRegister.get_cls(MindFormerModuleType.MODELS, name)
            assert made.family == family and network_class.config_class is made
            assert (made.__name__, network_class.__name__) == family.yaml_names[0]


class Counted(QuietHook):
    """A hook with a state of its own that sets a weight to the number of the step it is for."""

    def __init__(self) -> None:
        self.seen = []

    def inputs(self, step: int) -> dict:
        return {"weight": np.full(2, step, np.float32)}

    def after_step(self, step: int, figures) -> None:
        self.seen.append((step, figures.loss))

    def state(self) -> dict:
        return {"seen": np.array(len(self.seen))}

    def restore(self, state: dict) -> None:
        self.seen = [None] * int(state["seen"])


def test_hooks_see_mindformers_steps_and_their_state_is_in_its_checkpoint() -> None:
    network = nn.Cell()
    network.weight = Parameter(Tensor(np.zeros(2, np.float32)), name="weight")
    network.first_step, network.hook_state = 4, {"hook.1.seen": np.array(3)}
    parameters = InternalCallbackParam(train_network=network, train_hooks=[QuietHook()], cur_step_num=1)
    context, hook = RunContext(parameters), Counted()
    callback = HookCallback(hook)
    callback.on_train_begin(context)
    assert len(hook.seen) == 3 and network.weight.asnumpy().tolist() == [5, 5]
    parameters.net_outputs = (Tensor(1.5), Tensor(False), Tensor(2.0), Tensor(0.1), Tensor(0.5))
    callback.on_train_step_end(context)
    assert hook.seen[-1] == (5, 1.5) and network.weight.asnumpy().tolist() == [6, 6]
    assert hook_state(parameters.train_hooks) == {"hook.1.seen": np.array(4)}


def test_hooks_stand_before_the_checkpoint_and_behind_the_monitor() -> None:
    order = [WholeCheckpointMonitor, HookCallback, MoELossMonitor]
    callbacks = [cls.__new__(cls) for cls in order]
    trainer = PortableCausalLanguageModelingTrainer.__new__(PortableCausalLanguageModelingTrainer)
    trainer.config = MindFormerConfig(seed=5)
    found = trainer.sort_callbacks(callbacks)
    own = [DropoutSeeds, MaskInputs]
    assert [type(item) for item in found] == [MoELossMonitor, HookCallback, *own, WholeCheckpointMonitor]
    assert found[2].seed == found[3].seed == 5 and found[3].every == 0


@pytest.mark.parametrize("words", [{"seed": 0}, {}])
def test_a_seed_of_0_is_a_seed(words: dict[str, int]) -> None:
    """MindFormers leaves the global one unset then; a resumed run draws the weights below its adapters again."""
    spec = network_spec_from_yaml(config())
    ms.set_seed(9)
    seed_draws(seed_of(MindFormerConfig(**words)))
    first = {item.name: item.asnumpy() for item in build_causal_lm(spec).get_parameters()}
    ms.set_seed(9)
    resumed = build_causal_lm(spec)
    fill_base(SimpleNamespace(spec=spec, causal_lm=resumed), None, seed_of(MindFormerConfig(**words)))
    assert all(np.array_equal(item.asnumpy(), first[item.name]) for item in resumed.get_parameters())


def test_mindformers_takes_experts_without_sequence_parallel_while_we_train():
    rules = importlib.import_module("mindformers.tools.check_rules")
    asked = MindFormerConfig(moe_config={"expert_num": 8}, parallel_config={"use_seq_parallel": False})
    with experts_without_sequence_parallel():
        rules._check_moe_parallel_valid(asked, 4)
    with pytest.raises(ValueError, match="without also enabling sequence parallelism"):
        rules._check_moe_parallel_valid(asked, 4)


def test_a_stage_shows_the_load_of_its_own_layers(tmp_path, monkeypatch):
    """Two stages of two devices, the last rank: layers 2 and 3; sums that grow, across the end of 32 bits."""
    monkeypatch.setattr(load_monitor, "get_real_rank", lambda: 3)
    monkeypatch.setattr(load_monitor, "get_output_root_path", lambda: str(tmp_path))
    spec = network_spec_from_yaml(config())
    parallel = replace(spec.parallel, parallel_mode="semi_auto_parallel", device_num=4, pipeline_stage=2)
    spec = replace(spec, model=replace(spec.model, num_hidden_layers=4), parallel=parallel)
    held = {f"model.layers.{layer}.kept_report": Parameter(Tensor(np.zeros((1, 5)), ms.int32)) for layer in range(4)}
    loads, total = load_monitor.StageLoads(spec, held, 0), np.zeros((1, 5), np.int64)
    for step in (1, 2):
        total += [[2**31 - 8, 4, 3, 1, 2]] if step == 1 else [[10, 0, 6, 0, 4]]
        held["model.layers.3.kept_report"].set_data(Tensor(total.astype(np.int32)))
        loads.see(step, shows=False)
    last = json.loads((tmp_path / "metrics" / "load_rank_3.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["stage"], last["layers"]) == (2, 1, [2, 3])
    assert last["expert_load"] == [[0, 0, 0, 0], [10, 0, 6, 0]] and last["dropped"] == [0, 0.25]
