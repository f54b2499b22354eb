# SPDX-License-Identifier: Apache-2.0
"""A MindFormers YAML seen as a ``NetworkSpec`` and back; the words stand in ``core.config.keys``.

What MindFormers leaves implicit is written out here: ``n_kv_heads`` null means ``num_heads``, ``intermediate_size``
null follows from ``multiple_of`` and ``ffn_dim_multiplier``, ``max_position_embedding`` null means ``seq_length``,
``expert_num`` 1 means a dense network, and ``use_parallel: False`` means one device.

Our own keys, all in ``model.model_config`` because MindFormers refuses unknown keys in ``moe_config``:
``head_dim`` (width of a head where it is not hidden_size / num_heads), ``return_extra_loss`` (default True: the
routing losses are part of the loss), ``aux_loss_reduce`` (``sum`` or ``mean`` over layers), ``norm_single_choice`` (a
single chosen expert gets gate 1, as in Hugging Face's Mixtral; default False, MindFormers' rule); and of the families
``moe_intermediate_size``, ``shared_expert_intermediate_size``, ``shared_expert_scale``, ``dense_layers`` (numbers of
the layers without experts), ``moe_gate`` with the words of its noisy kinds (``core.layers.NOISY_WORDS``; by a
threshold ``core.layers.THRESHOLD_WORDS``),
``size_experts``, those of residual experts (``core.layers.RESIDUAL_WORDS``), ``add_rescale_bias`` (experts have biases,
as aligned ones of LLaMA-MoE v2), ``aux_loss_type`` (``layerwise``, ``switch`` or ``legacy_constant``) and
``qk_layernorm``; and of attention
``mlp_has_bias``, ``sliding_window`` (tokens that a token sees, itself included) and ``full_attention_layers`` (numbers
of the layers without a window).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindformers_ext.core.config.keys import (
    KEYS,
    MODEL,
    MODES,
    NOTED,
    OUR_SECTIONS,
    PIPELINE,
    TOP,
    UNBUILT,
    Key,
    defaults,
    known_keys,
)
from mindformers_ext.core.config.other_words import OTHER_WORDS
from mindformers_ext.core.config.quantised import check_not_quantised
from mindformers_ext.core.config.recompute import names_without_effect
from mindformers_ext.core.config.rope_words import read_extension, written_extension
from mindformers_ext.core.config.routing_words import NO_GRADIENT, read_routing, routing_notes, written_routing
from mindformers_ext.core.config.run import RUN_MODES, TRAINING
from mindformers_ext.core.config.train import FROZEN_GATES, trained_groups
from mindformers_ext.core.config.values import read_value, section_at
from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.errors import Problems, nearest
from mindformers_ext.core.families import GENERIC_NAMES, Family, family_of_features, named_family
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec, dtype_name, expert_sizes_told, told_sizes
from mindformers_ext.core.spec import FEATURES, KernelSpec, ModelSpec, NetworkSpec, NumericsSpec, ParallelSpec

Sections = dict[str, Mapping[str, Any]]
READ_MODES = (*RUN_MODES, "predict_with_train_model", None)  # MindFormers' own templates leave it out


def network_spec_from_yaml(config: Mapping[str, Any], device_num: int = 1) -> NetworkSpec:
    """The network that a MindFormers YAML describes, sizes as written (``core.cluster.cluster_rules`` judges them).

    Args:
        config: the YAML's content as plain mappings, raw or with MindFormers' template applied.
        device_num: devices of the whole job.

    Raises:
        UserError: lists every unknown key, wrong kind of value, unbuilt option and broken rule of the model.
    """
    problems = Problems("the configuration")
    check_not_quantised(config)
    sections = _sections(config, problems)
    _check_keys(sections, problems)
    parts: dict[str, dict[str, Any]] = {
        name: {} for name in ("model", "moe", "shared", "numerics", "kernels", "parallel", "network")
    }
    for key in KEYS:
        value = sections[key.section].get(key.name, key.default)
        parts[key.part][key.field] = read_value(_path(key), value, key.kind, key.default, problems)
    problems.raise_if_any()  # what follows computes with the values

    _complete_family(sections, parts, problems)
    _complete_model(parts["model"], sections[MODEL], parts["network"]["seq_length"], problems)
    _check_types_agree(sections[MODEL], parts["numerics"], problems)
    problems.positive("moe_config.expert_num", parts["moe"]["num_local_experts"])
    parts["moe"] |= read_routing(sections["moe_config"], parts["moe"], problems)
    parts["moe"]["shared_expert"] = _shared_expert(sections, parts, problems)
    parts["network"]["batch_size"] = _batch_size(sections, problems)
    if not read_value("use_parallel", sections[TOP].get("use_parallel", False), "bool", False, problems):
        parts["parallel"]["parallel_mode"] = "stand_alone"
    problems.raise_if_any()

    alike = expert_sizes_told(parts["moe"], parts["model"])
    row = _named_family(sections)
    always = row is not None and row.has_experts and not row.implied  # one expert is a mixture where the name says so
    moe = MoESpec(**parts["moe"] | alike) if parts["moe"]["num_local_experts"] > 1 or always else None
    model = ModelSpec(**parts["model"], moe=moe)
    model.collect(problems)
    numerics = NumericsSpec(**parts["numerics"])
    numerics.collect(problems)
    problems.raise_if_any()
    parallel = ParallelSpec(**parts["parallel"], device_num=device_num)
    kernels = KernelSpec(**parts["kernels"])
    packed = DOCUMENT_IDS in (section_at(config, "train_dataset").get("input_columns") or ())
    return NetworkSpec(
        model=model, numerics=numerics, parallel=parallel, kernels=kernels, packed=packed, **parts["network"]
    )


def yaml_from_network_spec(spec: NetworkSpec) -> dict[str, Any]:
    """The YAML sections that describe ``spec``; ``network_spec_from_yaml`` reads them back to an equal spec.

    Raises:
        UserError: where MindFormers' words cannot say what the spec holds.
    """
    problems = Problems("this network as YAML")
    if spec.model.moe and spec.model.moe.num_local_experts == 1 and not spec.model.family:
        problems.add("one expert", "expert_num: 1 means a dense network in YAML; use moe=None")
    if spec.model.moe and spec.model.moe.router_dtype == "float16":
        problems.add("router_dtype='float16'", "MindFormers reads router_dense_type float16 as float32; use float32")
    problems.raise_if_any()
    shared = spec.model.moe.shared_expert if spec.model.moe else None
    parts = {
        "model": spec.model,
        "moe": spec.model.moe,
        "shared": shared if shared and shared.weighs_each else None,
        "numerics": spec.numerics,
        "kernels": spec.kernels,
        "parallel": spec.parallel,
        "network": spec,
    }
    result: dict[str, Any] = {"use_parallel": spec.parallel.parallel_mode != "stand_alone"}
    sections: dict[str, dict[str, Any]] = {TOP: result, **{name: {} for name in OUR_SECTIONS if name}}
    for key in KEYS:
        if parts[key.part] is not None:
            sections[key.section][key.name] = _plain(key, getattr(parts[key.part], key.field))
    if spec.model.more_eos_token_ids:
        sections[MODEL]["eos_token_id"] = [spec.model.eos_token_id, *spec.model.more_eos_token_ids]
    sections[MODEL] |= written_extension(spec.model.rope_scaling)
    kind, architecture = spec.model.family_row.yaml_names[0] if spec.model.family else GENERIC_NAMES
    sections[MODEL] |= {"type": kind, "batch_size": spec.batch_size}
    sections["runner_config"]["batch_size"] = spec.batch_size
    if spec.model.moe:
        sections["moe_config"] |= written_routing(spec.model.moe)
        sections[MODEL] |= _plain_shared(shared)
    if spec.parallel.pipeline_interleave:
        sections["parallel"]["pipeline_config"] = sections[PIPELINE]
    result["model"] = {"model_config": sections[MODEL], "arch": {"type": architecture}}
    for name in ("moe_config", "parallel_config", "parallel", "runner_config"):
        if sections[name]:
            result[name] = sections[name]
    return result


def yaml_notes(config: Mapping[str, Any], moe: MoESpec | None = None) -> list[str]:
    """One line per key that is set, known and without effect here, so that nothing is ignored silently. ``moe``: what
    was read of it."""
    sections = _sections(config, Problems("the configuration"))
    notes = [
        f"{_join(section, name)}={sections[section][name]!r} is about speed or layout elsewhere and has no effect here"
        for section, keys in NOTED.items()
        for name, neutral in keys.items()
        if name in sections[section] and sections[section][name] not in neutral
    ]
    notes += [f"recompute_config.select_recompute: {name} keeps nothing here" for name in names_without_effect(config)]
    if dtype_name(sections["moe_config"].get("router_dense_type")) == "float16":
        notes.append("moe_config.router_dense_type float16 is read as float32, as MindFormers does")
    trains = sections[TOP].get("run_mode") in TRAINING
    if moe and moe.by_threshold and trains and FROZEN_GATES not in trained_groups(config):
        notes.append(NO_GRADIENT)
    masks = sections[MODEL].get("l0_module")
    if isinstance(masks, Mapping) and masks.get("target_model") and "target_sparsity" in masks:
        notes.append("l0_module.target_sparsity has no effect beside target_model, which says every size")
    return notes + routing_notes(sections["moe_config"], moe, trains)


def _sections(config: Mapping[str, Any], problems: Problems) -> Sections:
    """Our sections as mappings; ``moe_config`` and ``parallel_config`` may also stand in ``model_config``."""
    found: Sections = {TOP: config}
    for name in OUR_SECTIONS[1:]:
        parent, _, last = name.rpartition(".")
        found[name] = _mapping(name, found[parent].get(last), problems)
    if not found[MODEL]:
        problems.add("the section model.model_config is missing or empty", "describe the network there")
    for name in ("moe_config", "parallel_config"):
        nested = _mapping(f"{MODEL}.{name}", found[MODEL].get(name), problems)
        if nested:
            base = defaults(name)
            # the template fills the top-level section with defaults: those count as not written
            written = {key for key, value in found[name].items() if key in base and value != base[key]}
            if written and any(nested.get(key, base.get(key)) != found[name].get(key, base.get(key)) for key in base):
                problems.add(f"{name} stands at the top and in model_config and they differ", "keep the one at the top")
            found[name] = nested
    return found


def _mapping(name: str, value: Any, problems: Problems) -> Mapping[str, Any]:
    """A section's keys; MindFormers' own config objects (``MoEConfig``, ...) are unfolded."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "to_dict"):
        content = dict(value.to_dict())
        if content.get("aux_loss_types") == []:  # MoEConfig turns an absent list into an empty one
            del content["aux_loss_types"], content["aux_loss_factors"]
        return content
    problems.add(f"{name}={value!r} is not a section", "indent its keys below it")
    return {}


def _check_keys(sections: Sections, problems: Problems) -> None:
    """Unknown keys, and known keys whose value asks for what is not built."""
    problems.one_of("run_mode", sections[TOP].get("run_mode"), READ_MODES)
    for section, content in sections.items():
        known = known_keys(section)
        for name in content:
            if name not in known:
                problems.add(f"unknown key '{_join(section, str(name))}'", advice(section, str(name)))
        for name, neutral in UNBUILT.get(section, {}).items():
            if name in content and content[name] not in neutral:
                problems.add(
                    f"{_join(section, name)}={content[name]!r} is not built yet",
                    f"remove it or set it to {neutral[0]!r}",
                )


def advice(section: str, name: str) -> str:
    """Where an unknown key probably belongs: our word for another table's, another section, or the nearest word."""
    if name in OTHER_WORDS:
        return f"write '{OTHER_WORDS[name]}'"
    homes = [other for other in OUR_SECTIONS if other != section and name in known_keys(other)]
    if homes and section:
        return "it belongs to " + (f"'{homes[0]}'" if homes[0] else "the top level")
    return nearest(name, known_keys(section))


def _complete_family(sections: Sections, parts: dict[str, dict[str, Any]], problems: Problems) -> None:
    """The family that the names mean, and what it fixes: such a key need not be written, and must not contradict.

    A family that experts alone imply (``core.families``) fixes nothing here: training may route otherwise.
    """
    model = parts["model"]
    model |= {name: model[name] or () for name in ("dense_layers", "full_attention_layers")}
    row = _named_family(sections)
    moe = parts["moe"]
    moe["gate"] = moe["gate"] or (row.gate if row else "linear")
    if row is None and moe["num_local_experts"] in (1, None):
        features = {name: model[name] for name in FEATURES}
        row = family_of_features(features, model["sliding_window"] is not None, bool(model["full_attention_layers"]))
    if row is None or row.implied:
        return
    parts["model"]["family"] = row.name
    for part, fixed in (("model", row.model), ("moe", row.moe)):
        for field, value in fixed.items():
            key = next(key for key in KEYS if (key.part, key.field) == (part, field))
            written = parts[part][field]
            if written not in (key.default, value):
                problems.add(f"{_path(key)}={written!r} of a {row.name}", f"leave it out: it is {value!r}")
            parts[part][field] = value


def _named_family(sections: Sections) -> Family | None:
    arch = sections["model"].get("arch")
    return named_family(sections[MODEL].get("type"), arch.get("type") if isinstance(arch, Mapping) else None)


def _shared_expert(
    sections: Sections, parts: Mapping[str, Mapping[str, Any]], problems: Problems
) -> SharedExpertSpec | None:
    """``shared_expert_num`` experts in one, as MindFormers builds them: n times an expert's width, unless it is given.

    A family that has a shared expert has it without a word; MindFormers' template fills in 0, which is no word either.
    """
    words, model = sections["moe_config"], sections[MODEL]
    row = _named_family(sections)
    own = row.shared if row else None
    count = read_value("moe_config.shared_expert_num", words.get("shared_expert_num", 0), "int", 0, problems)
    count = count or (1 if own is not None else 0)
    width_key, scale_key = "shared_expert_intermediate_size", "shared_expert_scale"
    gated_key = "use_shared_expert_gating"
    expert = parts["moe"]["intermediate_size"] or parts["model"]["intermediate_size"]
    width = read_value(f"{MODEL}.{width_key}", model.get(width_key), "int", count * (expert or 0), problems)
    gated = read_value(f"moe_config.{gated_key}", words.get(gated_key, False), "bool", False, problems)
    scale = read_value(f"{MODEL}.{scale_key}", model.get(scale_key), "factors", 1.0, problems)
    if count < 1:
        lost = [name for name, given in ((width_key, model), (scale_key, model)) if given.get(name) is not None]
        lost += [gated_key] if gated else []
        lost += [key.name for key in KEYS if key.part == "shared" and parts["shared"][key.field] != key.default]
        if lost or count < 0:
            problems.add(f"{', '.join(lost)} with shared_expert_num={count}", "set moe_config.shared_expert_num: 1")
        return None
    found = SharedExpertSpec(intermediate_size=width, scale=scale, **{"gated": gated, **(own or {})}, **parts["shared"])
    if not found.weighs_each:  # MindFormers builds several as a wider one
        return found
    sizes = told_sizes(found.expert_sizes, count, width, {"num_hidden_layers": parts["model"]["num_hidden_layers"]})
    return replace(found, num_experts=count, expert_sizes=sizes)


def _complete_model(model: dict[str, Any], words: Mapping[str, Any], seq_length: int, problems: Problems) -> None:
    """Fill what MindFormers derives; the feed-forward width is LlamaFeedForward's formula."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if model["num_key_value_heads"] is None:
        model["num_key_value_heads"] = heads
    if model["max_position_embeddings"] is None:
        model["max_position_embeddings"] = seq_length
    if model["head_dim"] is None:
        if heads > 0 and hidden % heads:
            problems.divides("hidden_size", hidden, "num_heads", heads)
        model["head_dim"] = hidden // heads if heads > 0 else hidden
    if model["intermediate_size"] is None:
        multiple = read_value(f"{MODEL}.multiple_of", words.get("multiple_of", 256), "int", 256, problems)
        factor = words.get("ffn_dim_multiplier")
        factor = read_value(f"{MODEL}.ffn_dim_multiplier", factor, "float", None, problems)
        if factor is not None and not 0 < factor <= 1000:
            problems.add(f"{MODEL}.ffn_dim_multiplier={factor} is out of range", "give a number above 0, about 1")
            factor = None
        wide = 4 * hidden if factor is None else int((factor + 0.01) * 4 * hidden)
        multiple = max(1, multiple)
        model["intermediate_size"] = multiple * ((int(2 * wide / 3) + multiple - 1) // multiple)
    model["rope_theta"], model["rope_scaling"] = read_extension(words, model["rope_theta"], problems)
    first, *more = model["eos_token_id"]
    model |= {"eos_token_id": first, "more_eos_token_ids": tuple(more)}


def _check_types_agree(words: Mapping[str, Any], numerics: Mapping[str, str], problems: Problems) -> None:
    """``residual_dtype`` and ``embedding_init_type`` may only repeat what they default to."""
    for name, other in (("residual_dtype", "compute_dtype"), ("embedding_init_type", "param_dtype")):
        value = read_value(f"{MODEL}.{name}", words.get(name), "dtype", None, problems)
        if value not in (None, numerics[other]):
            problems.add(f"{MODEL}.{name}={value} is not built yet", f"remove it or set it to {numerics[other]}")


def _batch_size(sections: Sections, problems: Problems) -> int:
    """Sequences per data-parallel slice when training, of the whole batch otherwise.

    MindFormers' trainer overwrites ``runner_config.batch_size`` with the global batch and keeps the written one as
    ``mini_batch_size``.
    """
    own, runner = sections[MODEL].get("batch_size", 1), sections["runner_config"]
    if sections[TOP].get("run_mode") in ("eval", "predict"):
        return int(read_value(f"{MODEL}.batch_size", own, "int", 1, problems))
    name = "mini_batch_size" if "mini_batch_size" in runner else "batch_size"
    return int(read_value(f"runner_config.{name}", runner.get(name, own), "int", 1, problems))


def _plain_shared(shared: SharedExpertSpec | None) -> dict[str, Any]:
    if shared is None:
        return {}
    scale = list(shared.scale) if isinstance(shared.scale, tuple) else shared.scale
    return {"shared_expert_intermediate_size": shared.intermediate_size, "shared_expert_scale": scale}


def _plain(key: Key, value: Any) -> Any:
    if key.kind == "mode":
        return next((number for number, name in MODES.items() if name == value), 1)
    if isinstance(value, tuple) and key.kind in ("layers", "factors", "sizes"):
        return [list(item) if isinstance(item, tuple) else item for item in value]
    return value


def _path(key: Key) -> str:
    return _join(key.section, key.name)


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
