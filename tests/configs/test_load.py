"""Precedence, provenance, and that what is wrong is said in one sentence that names the key, the value and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.flags import BY_KEY, FLAGS
from configs.load import Resolved, env_name, load, presets
from configs.schema import KEYS, SECRET_KEYS, SECTIONS, Config, is_loopback
from protocol.errors import ConfigError

# A value other than the default for each key with a flag, as text.
OTHER = {
    "scheduler.policy": "priority",
    "scheduler.tenants_file": "t.yaml",
    "model.served_name": "mine",
    "model.revision": "v2",
    "model.max_len": "2048",
    "model.dtype": "bfloat16",
    "model.device": "cpu",
    "model.block_size": "32",
    "model.num_blocks_override": "77",
    "model.kv_cache_bytes": "123456",
    "model.host_cache_bytes": "65432",
    "model.gpu_memory_utilization": "0.5",
    "model.enable_prefix_caching": "false",
    "model.seed": "7",
    "model.chat_template": "t.jinja",
    "model.step_log": "s.jsonl",
    "model.cpu_sharing": "lend",
    "model.quantization": "int8",
    "prefill.replicas": "3",
    "decode.replicas": "2",
    "prefill.tp": "2",
    "prefill.pp": "3",
    "decode.tp": "4",
    "decode.pp": "5",
    "decode.max_num_seqs": "8",
    "prefill.max_num_batched_tokens": "64",
    "decode.enable_chunked_prefill": "false",
    "decode.preemption_mode": "swap",
    "decode.speculative_method": "ngram",
    "decode.speculative_model": "drafts/small",
    "decode.num_speculative_tokens": "7",
    "decode.prompt_lookup_max": "6",
    "decode.prompt_lookup_min": "3",
    "gateway.host": "127.0.0.2",
    "gateway.port": "8123",
    "gateway.api_key": "secret",
    "transfer.transport": "tcp",
    "transfer.bind_host": "10.1.0.0/16",
    "transfer.port_range": "20000-20999",
}


def differences(config: Config) -> dict[str, Any]:
    plain = load().config
    return {key: config.get(key) for key in KEYS if config.get(key) != plain.get(key)}


def message(**kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(**kwargs)
    return error.value.message


# ---- the table of flags ----------------------------------------------------------------------------------------------


def test_every_flag_is_one_key_and_no_key_has_two() -> None:
    assert len({flag.flag for flag in FLAGS}) == len({flag.key for flag in FLAGS}) == len(FLAGS)
    assert set(BY_KEY) <= set(KEYS)
    assert set(BY_KEY) == set(OTHER)
    assert all(flag.help and (flag.choices or flag.metavar or flag.type == "bool") for flag in FLAGS)


@pytest.mark.parametrize("key", sorted(OTHER))
@pytest.mark.parametrize("layer", ["flag", "env", "set", "file"])
def test_every_layer_changes_exactly_its_key(key: str, layer: str, tmp_path: Path) -> None:
    text = OTHER[key]
    if layer == "flag":
        resolved, origin = load(flags={key: text}), f"flag {BY_KEY[key].flag}"
    elif layer == "env":
        resolved, origin = load(env={env_name(key): text}), f"env {env_name(key)}"
    elif layer == "set":
        resolved, origin = load(sets=[f"{key}={text}"]), "--set"
    else:
        path = tmp_path / "c.yaml"
        section, name = key.split(".")
        path.write_text(f"# a comment\n{section}:\n  {name}: {text}\n")
        resolved, origin = load(file=path), f"file {path}:3"
    changed = differences(resolved.config)
    assert list(changed) == [key]
    shown = changed[key]
    assert (str(shown).lower() if isinstance(shown, bool) else str(shown)) == text
    assert resolved.provenance[key] == origin


def test_switches_have_a_no_form() -> None:
    switches = {flag.key: flag for flag in FLAGS if flag.type == "bool"}
    assert set(switches) == {"model.enable_prefix_caching", "decode.enable_chunked_prefill"}
    resolved = load(flags={"model.enable_prefix_caching": False})
    assert resolved.config.model.enable_prefix_caching is False
    assert resolved.provenance["model.enable_prefix_caching"] == "flag --no-enable-prefix-caching"
    again = load(env={"TANDEM_MODEL_ENABLE_PREFIX_CACHING": "0"}, flags={"model.enable_prefix_caching": True})
    assert again.config.model.enable_prefix_caching is True


# ---- precedence ------------------------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("decode:\n  max_num_seqs: 11\n")
    env = {"TANDEM_DECODE_MAX_NUM_SEQS": "12"}
    flags = {"decode.max_num_seqs": "13"}
    sets = ["decode.max_num_seqs=14", "decode.max_num_seqs=15"]

    def seen(resolved: Resolved) -> tuple[int, str]:
        return resolved.config.decode.max_num_seqs, resolved.provenance["decode.max_num_seqs"]

    assert seen(load("low-latency")) == (16, "preset low-latency")
    assert seen(load("low-latency", path)) == (11, f"file {path}:2")
    assert seen(load("low-latency", path, env)) == (12, "env TANDEM_DECODE_MAX_NUM_SEQS")
    assert seen(load("low-latency", path, env, flags)) == (13, "flag --max-num-seqs")
    assert seen(load("low-latency", path, env, flags, sets)) == (15, "--set")
    assert load().provenance["model.name"] == "default"
    assert load(flags={"model.name": "toy"}).provenance["model.name"] == "argument MODEL"


def test_preset_and_file_can_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("gateway: {port: 9001}\n")
    resolved = load(env={"TANDEM_PRESET": "high-throughput", "TANDEM_CONFIG": str(path)})
    assert resolved.config.gateway.port == 9001
    assert resolved.provenance["decode.max_num_seqs"] == "preset high-throughput"
    assert load("general", env={"TANDEM_PRESET": "high-throughput"}).config.decode.max_num_seqs == 64


def test_presets_differ_where_it_matters_and_general_is_the_default() -> None:
    assert presets() == ["general", "high-throughput", "low-latency"]
    assert load("general").config == Config()
    folder = Path(load.__code__.co_filename).parent
    listed = {name: yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in presets()}
    keys = {name: {f"{s}.{k}" for s, body in found.items() for k in body} for name, found in listed.items()}
    assert keys["general"] == keys["low-latency"] == keys["high-throughput"], "comparable side by side"
    for name in ("low-latency", "high-throughput"):
        assert set(differences(load(name).config)) == keys[name], "nothing is listed that does not differ"


def test_a_configuration_survives_the_wire() -> None:
    config = load(sets=["model.max_len=99", "gateway.api_key=k"]).config
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"sets": ["model.nmae=x"]}, ["model.nmae", "--set", "did you mean model.name"]),
        ({"sets": ["decode.repliacs=2"]}, ["did you mean decode.replicas"]),
        ({"sets": ["port=1"]}, ["did you mean gateway.port"]),
        ({"sets": ["zzz.qqq=1"]}, ["the sections are model, prefill"]),
        ({"sets": ["model.seed"]}, ["section.name=value"]),
        ({"sets": ["decode.replicas=0"]}, ["decode.replicas", "'0'", "at least 1"]),
        ({"sets": ["gateway.port=70000"]}, ["65,535"]),
        ({"sets": ["model.seed=1.5"]}, ["an integer"]),
        ({"sets": ["model.gpu_memory_utilization=1.2"]}, ["above 0 and at most 1"]),
        ({"sets": ["scheduler.queue_timeout_s=nan"]}, ["a number"]),
        ({"sets": ["model.enable_prefix_caching=maybe"]}, ["true or false"]),
        ({"sets": ["model.dtype=bflaot16"]}, ["did you mean bfloat16"]),
        ({"sets": ["model.kv_cache_bytes=lots"]}, ["512MiB"]),
        ({"sets": ["model.name="]}, ["non-empty"]),
        ({"sets": ["model.quantization=awq"]}, ["recognised by themselves", "not built yet"]),
        ({"sets": ["scheduler.policy=fiar"]}, ["fcfs, priority, slo", "did you mean fair"]),
        ({"sets": ["transfer.verify=false"]}, ["must stay true"]),
        ({"preset": "genral"}, ["genral", "did you mean general"]),
        ({"flags": {"gateway.host": "0.0.0.0"}}, ["0.0.0.0", "gateway.api_key"]),
        ({"flags": {"gateway.host": "example.org"}}, ["example.org"]),
        ({"sets": ["gateway.host=::", "gateway.api_key= "]}, ["api_key"]),
        ({"sets": ["decode.max_num_batched_tokens=8"]}, ["below decode.max_num_seqs 64"]),
        ({"sets": ["decode.enable_chunked_prefill=no", "model.max_len=4096"]}, ["must fit into one step"]),
        ({"env": {"TANDEM_MODEL_NAM": "x"}}, ["TANDEM_MODEL_NAM", "TANDEM_MODEL_NAME"]),
        ({"env": {"TANDEM_MODLE_NAME": "x"}}, ["TANDEM_MODEL_NAME"]),
        ({"env": {"TANDEM_GATEWAY_PORT": "http"}}, ["env TANDEM_GATEWAY_PORT", "an integer"]),
        ({"file": "/nowhere/c.yaml"}, ["/nowhere/c.yaml", "No such file"]),
    ],
)
def test_errors_name_the_key_the_value_and_the_way_out(kwargs: dict[str, Any], parts: list[str]) -> None:
    text = message(**kwargs)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modle:\n  name: x\n", [":1"]),
        ("model:\n  name: x\n  nmae: y\n", [":3", "model.name"]),
        ("model:\n  name: x\n  name: y\n", ["twice", "2", "3"]),
        ("model: [1, 2]\n", [":1", "section"]),
        ("- a\n", ["section"]),
        ("model:\n\tname: x\n", ["YAML"]),
        ("model:\n  max_len: soon\n", [":2", "an integer"]),
        ("model:\n  name: 5\n", [":2", "string"]),
        ("model:\n  name: !!python/object:os.system x\n", ["YAML"]),
    ],
)
def test_errors_in_a_file_name_the_line(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "with a space.yaml"
    path.write_text(text)
    found = message(file=path)
    assert all(part in found for part in [str(path), *parts]), found


def test_empty_files_and_sections_are_fine(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "model:\n", "{}"):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        assert load(file=path).config == Config()


def test_secrets_are_not_shown() -> None:
    resolved = load(env={"TANDEM_GATEWAY_API_KEY": "hunter2"})
    assert resolved.config.gateway.api_key == "hunter2"
    assert "hunter2" not in repr(resolved.rows())
    assert "hunter2" not in message(sets=["gateway.api_key=hunter2é", "gateway.host=0.0.0.0"])
    assert {"gateway.api_key"} == SECRET_KEYS


def test_what_kubernetes_and_others_put_into_the_environment_is_left_alone() -> None:
    env = {
        "TANDEM_GATEWAY_PORT": "tcp://10.0.0.7:80",
        "TANDEM_GATEWAY_SERVICE_HOST": "10.0.0.7",
        "TANDEM_GATEWAY_SERVICE_PORT_HTTP": "80",
        "TANDEM_GATEWAY_PORT_80_TCP_ADDR": "10.0.0.7",
        "TANDEM_TRACES": "/data",
        "TANDEM_CRDS": "/data",
        "TANDEM_BICYCLE": "1",
        "HOME": "/root",
    }
    assert load(env=env).config == Config()


def test_what_does_nothing_is_said() -> None:
    notes = load(sets=["prefill.replicas=0", "prefill.max_num_batched_tokens=64", "transfer.transport=shm"]).notes
    assert len(notes) == 2
    assert "decode.max_num_batched_tokens" in notes[0]
    assert "gpu_memory_utilization" in load(flags={"model.device": "cpu", "model.gpu_memory_utilization": "0.5"}).notes[0]
    assert load("low-latency").notes == load().notes == ()


@pytest.mark.parametrize(
    ("text", "number"),
    [("512MiB", 2**29), ("2GiB", 2**31), ("1.5G", 1_500_000_000), ("4096", 4096), ("64 kb", 64_000), ("1Ti", 2**40)],
)
def test_bytes_have_units(text: str, number: int, tmp_path: Path) -> None:
    assert load(sets=[f"model.kv_cache_bytes={text}"]).config.model.kv_cache_bytes == number
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{kv_cache_bytes: {text}}}\n")
    assert load(file=path).config.model.kv_cache_bytes == number


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert load(flags={"gateway.host": host}).config.gateway.host == host


@given(st.sampled_from(sorted(KEYS)), st.text(max_size=12) | st.integers().map(str) | st.floats().map(str))
def test_any_text_is_a_value_or_a_sentence(key: str, text: str) -> None:
    try:
        resolved = load(sets=[f"{key}={text}"])
    except ConfigError as error:
        assert key.split(".")[0] in error.message  # noqa: PT017
    else:
        assert resolved.provenance[key] == "--set"


def test_every_key_has_its_words() -> None:
    assert {key.split(".")[0] for key in KEYS} == set(SECTIONS)
    for key in KEYS.values():
        assert key.help, key.name
        assert not key.help.endswith("."), key.name
    defaults = Config()
    assert all(defaults.get(key.name) == key.default for key in KEYS.values())
