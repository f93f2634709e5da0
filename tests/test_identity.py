"""Identity: what counts changes the namespace and is named, what does not count does neither."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prefixstore import fingerprint
from prefixstore.fingerprint import lora_fingerprint, weights_fingerprint
from prefixstore.identity import FieldDifference, IdentityError, ModelIdentity, canonical_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MIB = 1 << 20
GOLDEN = ModelIdentity(
    architecture="LlamaForCausalLM",
    num_layers=32,
    num_kv_heads=8,
    head_size=128,
    rope='{"rope_theta":500000,"rope_type":"default"}',
    attention='{"attention_bias":false}',
    weights=f"commit:{COMMIT}",
    model_dtype="bfloat16",
    kv_dtype="bfloat16",
    chunk_tokens=64,
)
CHANGES: dict[str, str | int] = {
    "architecture": "MistralForCausalLM",
    "num_layers": 33,
    "num_kv_heads": 4,
    "head_size": 64,
    "rope": '{"rope_theta":10000,"rope_type":"default"}',
    "attention": '{"attention_bias":true}',
    "weights": "sampled:00",
    "model_dtype": "float16",
    "kv_dtype": "fp8_e4m3",
    "chunk_tokens": 128,
    "kv_scales": "static",
    "quantization": "awq",
    "lora": "sampled:11",
    "forward": '{"rms_norm_eps":1e-06}',
    "format_version": 2,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}


def write_safetensors(path: Path, tensor_bytes: list[int], *, fill: bytes = b"\x11") -> int:
    """Write uint8 tensors of the given sizes, sparse but for one byte; returns the data's start."""
    header, begin = {}, 0
    for index, size in enumerate(tensor_bytes):
        offsets = [begin, begin + size]
        header[f"t{index}"] = {"dtype": "U8", "shape": [size], "data_offsets": offsets}
        begin += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + fill)
        file.truncate(8 + len(text) + begin)
    return 8 + len(text)


def flip(path: Path, offset: int) -> None:
    """Change one byte and put the file's times back."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(folder / "model.safetensors", [300 << 10])
    return folder


def identity(model: Path, **config: Any) -> ModelIdentity:
    return ModelIdentity.from_folder(model, config_overrides=config)


def rope_of(model: Path, config: dict[str, Any]) -> str:
    base = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    (model / "config.json").write_text(json.dumps({**base, **config}))
    return ModelIdentity.from_folder(model).rope


# --- the digest ---------------------------------------------------------------------------------


def test_golden_namespaces() -> None:
    """Fixed for ever: a change makes every store unreadable. The hex is coreutils' `b2sum -l 128`
    over the prefix and the JSON written by hand."""
    assert GOLDEN.namespace_hex == "306039a261d471a64f209b591baa85a1"
    other = dataclasses.replace(
        GOLDEN, kv_dtype="fp8_e4m3", kv_scales="static", lora="sampled:\u00e9", chunk_tokens=128
    )
    assert other.namespace_hex == "661a153c73d76964ad766b0d1ee2ac77"
    assert other.namespace == bytes.fromhex(other.namespace_hex)


def test_changes_cover_all_fields() -> None:
    assert list(CHANGES) == [field.name for field in dataclasses.fields(ModelIdentity)]


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_field_changes_the_namespace_and_is_named(name: str) -> None:
    changed = ModelIdentity(**{**dataclasses.asdict(GOLDEN), name: CHANGES[name]})
    assert changed.namespace != GOLDEN.namespace
    assert GOLDEN.difference(changed) == [
        FieldDifference(name, getattr(GOLDEN, name), CHANGES[name])
    ]
    line = GOLDEN.explain_mismatch(changed)
    assert line.startswith(name)
    assert "\n" not in line
    assert [other for other in CHANGES if f"{other}: ours" in line and other != name] == []


def test_equal_identities_have_no_difference() -> None:
    same = ModelIdentity.from_json(GOLDEN.to_json())
    assert same == GOLDEN
    assert same.namespace == GOLDEN.namespace
    assert (same.difference(GOLDEN), same.explain_mismatch(GOLDEN)) == ([], "")


def test_mismatch_names_the_entry_and_shortens_values() -> None:
    rope = canonical_json({"rope_theta": 500000, "rope_type": "yarn", "factor": list(range(99))})
    line = GOLDEN.explain_mismatch(dataclasses.replace(GOLDEN, rope=rope))
    assert 'rope.rope_type: ours "default", theirs "yarn"' in line
    assert "rope.factor: ours (absent), theirs [0,1,2" in line
    assert "rope_theta" not in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": True}, "num_layers is True; expected int"),
        ({"chunk_tokens": 64.0}, "chunk_tokens is 64.0; expected int"),
        ({"weights": ""}, "weights is empty"),
        ({"architecture": None}, "architecture is None; expected str"),
        ({"kv_dtype": "auto"}, "kv_dtype is 'auto'"),
        ({"model_dtype": "torch bf16"}, "model_dtype is 'torch bf16'"),
        ({"rope": "{"}, "rope is not JSON"),
        ({"rope": '{"b": 1}'}, "rope is not a canonical JSON object"),
        ({"forward": "[]"}, "forward is not a canonical JSON object"),
    ],
)
def test_bad_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        dataclasses.replace(GOLDEN, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a JSON list"),
        ('{"lora":""}', "lacks fields"),
        (GOLDEN.to_json()[:-1] + ',"extra":1}', r"unknown fields \['extra'\]"),
        (GOLDEN.to_json().replace('"num_layers":32', '"num_layers":"32"'), "num_layers"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        ModelIdentity.from_json(text)


# --- config.json --------------------------------------------------------------------------------


def test_fields_from_a_plain_config(model: Path) -> None:
    found = ModelIdentity.from_folder(model, chunk_tokens=32, kv_dtype="fp8", lora="sampled:aa")
    assert found == ModelIdentity(
        architecture="LlamaForCausalLM",
        num_layers=8,
        num_kv_heads=2,
        head_size=64,
        rope='{"rope_theta":10000,"rope_type":"default"}',
        attention="{}",
        weights=weights_fingerprint(model),
        model_dtype="bfloat16",
        kv_dtype="fp8_e4m3",
        chunk_tokens=32,
        lora="sampled:aa",
        forward='{"hidden_size":256,"model_type":"llama","num_attention_heads":4,'
        '"rms_norm_eps":1e-05}',
    )


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"rope_theta": 500000.0}, "rope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope"),
        ({"partial_rotary_factor": 0.5}, "rope"),
        ({"sliding_window": 4096}, "attention"),
        ({"sliding_window": None}, "attention"),
        ({"attention_bias": True}, "attention"),
        ({"rms_norm_eps": 1e-06}, "forward"),
        ({"setting_of_next_year": 1}, "forward"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"head_dim": 32}, "head_size"),
    ],
)
def test_config_changes_are_seen(model: Path, config: dict[str, Any], field: str) -> None:
    difference = identity(model).difference(identity(model, **config))
    assert [d.name for d in difference if d.name != "forward" or field == "forward"] == [field]


@pytest.mark.parametrize(
    "config",
    [
        {"transformers_version": "5.0.0"},
        {"eos_token_id": 7},
        {"use_cache": False},
        {"max_position_embeddings": 4096},
        {"rope_theta": 10000},
    ],
)
def test_harmless_config_changes_are_not(model: Path, config: dict[str, Any]) -> None:
    assert identity(model) == identity(model, **config)


def test_rope_spellings_agree(model: Path) -> None:
    old = rope_of(model, {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}})
    new = rope_of(
        model, {"rope_parameters": {"rope_type": "llama3", "factor": 8, "rope_theta": 500000}}
    )
    assert old == new == '{"factor":8,"rope_theta":500000,"rope_type":"llama3"}'


def test_conflicting_rope_settings_are_both_kept(model: Path) -> None:
    rope = rope_of(model, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}})
    assert json.loads(rope) == {
        "rope_theta": 500000,
        "config.rope_theta": 10000,
        "rope_type": "default",
    }


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "kind_of_next_year"])
def test_max_positions_count_where_rope_depends_on_them(model: Path, kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 2.0}
    per_layer = {"full_attention": scaling, "sliding_attention": {"rope_type": "default"}}
    for config in ({"rope_scaling": scaling}, {"rope_parameters": per_layer}):
        short = identity(model, **config, max_position_embeddings=4096)
        long = identity(model, **config, max_position_embeddings=8192)
        assert [d.name for d in short.difference(long)] == ["rope"]


def test_nested_text_config(model: Path) -> None:
    plain = identity(model)
    outer = {
        "architectures": CONFIG["architectures"],
        "text_config": {k: v for k, v in CONFIG.items() if k != "architectures"},
        "vision_config": {"patch_size": 14},
    }
    (model / "config.json").write_text(json.dumps(outer))
    nested = identity(model)
    assert [d.name for d in plain.difference(nested)] == ["forward"]
    assert identity(model, vision_config={"patch_size": 16}).difference(nested)[0].name == "forward"
    merged = identity(model, text_config={"num_hidden_layers": 9})
    assert [d.name for d in nested.difference(merged)] == ["num_layers"]


def test_mla_and_multi_query_shapes(model: Path) -> None:
    mla = identity(model, kv_lora_rank=512, qk_rope_head_dim=64)
    assert (mla.num_kv_heads, mla.head_size) == (1, 576)
    falcon = identity(model, num_key_value_heads=None, multi_query=True)
    assert (falcon.num_kv_heads, falcon.head_size) == (1, 64)
    assert identity(model, num_key_value_heads=None).num_kv_heads == 4


def test_engine_quantization_adds_to_the_configs(model: Path) -> None:
    config = {"quantization_config": {"bits": 4}}
    found = ModelIdentity.from_folder(model, quantization="awq_marlin", config_overrides=config)
    assert found.quantization == 'awq_marlin {"bits":4}'


# --- weights ------------------------------------------------------------------------------------


def test_folder_name_and_times_do_not_count(model: Path, tmp_path: Path) -> None:
    before = identity(model)
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "other-name")
    os.utime(moved / "model.safetensors", (1, 1))
    assert identity(moved) == before
    (moved / "model.safetensors").rename(moved / "renamed.safetensors")
    assert identity(moved).weights != before.weights


def test_every_byte_of_a_small_file_counts(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    seen = {weights_fingerprint(model)}
    for offset in (size // 2, size // 3, size - 1):
        flip(path, offset)
        seen.add(weights_fingerprint(model))
    assert len(seen) == 4


def test_ends_and_every_tensor_of_a_large_file_count(model: Path) -> None:
    sizes = [5 * MIB, 40 << 10, 3 * MIB, 1, 60 << 10, 9 * MIB]
    path = model / "model.safetensors"
    start = write_safetensors(path, sizes)
    size = path.stat().st_size
    middles = [start + sum(sizes[:i]) + sizes[i] // 2 for i in range(len(sizes))]
    seen = {weights_fingerprint(model)}
    for offset in (start, (64 << 10) - 1, size - (64 << 10), size - 1, *middles):
        flip(path, offset)
        seen.add(weights_fingerprint(model))
    assert len(seen) == 1 + 4 + len(sizes)


def test_full_check_sees_what_sampling_does_not(model: Path) -> None:
    path = model / "model.safetensors"
    start = write_safetensors(path, [64 * MIB])
    ranges = fingerprint._sample_ranges(path.stat().st_size, start, [])
    unseen = ranges[5][1] + 100
    before = {check: weights_fingerprint(model, check=check) for check in ("sampled", "full")}
    flip(path, unseen)
    assert weights_fingerprint(model, check="sampled") == before["sampled"]
    assert weights_fingerprint(model, check="full") != before["full"]
    assert before["full"].startswith("full:")


def test_shards_index_and_code_count(model: Path) -> None:
    seen = [weights_fingerprint(model)]
    write_safetensors(model / "model-00002.safetensors", [10])
    seen.append(weights_fingerprint(model))
    (model / "model.safetensors.index.json").write_text("{}")
    seen.append(weights_fingerprint(model))
    (model / "modeling_custom.py").write_text("x = 1\n")
    seen.append(weights_fingerprint(model))
    (model / "README.md").write_text("does not count")
    assert weights_fingerprint(model) == seen[-1]
    assert len(set(seen)) == 4


def test_linked_folders_count_once(model: Path, tmp_path: Path) -> None:
    plain = weights_fingerprint(model)
    (model / "loop").symlink_to(model)
    assert weights_fingerprint(model) == plain
    outside = tmp_path / "outside"
    outside.mkdir()
    write_safetensors(outside / "more.safetensors", [10])
    (model / "linked").symlink_to(outside)
    assert weights_fingerprint(model) != plain


def test_ranges_cover_both_ends_and_never_overlap() -> None:
    for size in (MIB, MIB + 1, 3 * MIB + 5, 5 << 30):
        middles = [size // 2, size // 2 + 100, size - 1, 0]
        ranges = fingerprint._sample_ranges(size, 1000, middles)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
        assert all(any(a <= m < b for a, b in ranges) for m in middles)
        assert sum(b - a for a, b in ranges) < MIB


def test_hub_snapshot_is_its_commit(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    assert identity(snapshot).weights == f"commit:{COMMIT}"
    assert weights_fingerprint(snapshot, check="full").startswith("full:")
    elsewhere = shutil.copytree(model, tmp_path / "runs" / "snapshots" / COMMIT)
    assert identity(elsewhere).weights.startswith("sampled:")


def test_revision_counts_only_as_a_full_commit(model: Path) -> None:
    assert weights_fingerprint(model, revision=COMMIT.upper()) == f"commit:{COMMIT}"
    assert weights_fingerprint(model, revision="main") == weights_fingerprint(model)


def test_lora_fingerprint(tmp_path: Path) -> None:
    config = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "a"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "adapter_model.safetensors", [1000])
    before = lora_fingerprint(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/other/place"}, indent=2)
    )
    assert lora_fingerprint(tmp_path) == before
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 32}))
    scaled = lora_fingerprint(tmp_path)
    flip(tmp_path / "adapter_model.safetensors", 700)
    assert len({before, scaled, lora_fingerprint(tmp_path)}) == 3


# --- bad folders --------------------------------------------------------------------------------


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_text(text: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "config.json").write_text(text)

    return write


def config_without(key: str) -> Callable[[Path], None]:
    return config_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))


def weights_bytes(data: bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors").write_bytes(data)

    return write


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def dangling_weights(model: Path) -> None:
    no_weights(model)
    (model / "model.safetensors").symlink_to("blobs/gone")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be opened .*give the path of a local folder"),
        (no_config, "config.json .*must hold config.json"),
        (config_text('{"a": '), "not valid JSON .*download it again"),
        (config_text("[" * 100_000), "not valid JSON"),
        (config_text("[1]"), "holds a JSON list; expected an object"),
        (config_text(json.dumps({**CONFIG, "x": float("nan")})), "cannot be written as JSON"),
        (config_text(json.dumps({**CONFIG, "rope_scaling": 2})), "rope_scaling = 2"),
        (
            config_text(json.dumps({**CONFIG, "num_key_value_heads": [1, 2]})),
            "num_key_value_heads = .*the same for all layers",
        ),
        (config_without("num_hidden_layers"), "lacks num_hidden_layers .*config_overrides"),
        (config_without("torch_dtype"), "names no dtype; pass model_dtype"),
        (dangling_weights, "cannot read .*model.safetensors .*must be there"),
        (no_weights, "no weight files .*or pass the model's full commit hash"),
        (weights_bytes(b""), "not a whole safetensors file"),
        (weights_bytes((1 << 62).to_bytes(8, "little") + b"{}"), "header claims 46116860184"),
        (weights_bytes((2).to_bytes(8, "little") + b"{]"), "header is not JSON"),
        (weights_bytes((2).to_bytes(8, "little") + b"[]"), "header is not a JSON object"),
        (weights_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    ],
)
def test_bad_folders_are_refused(model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model)
    with pytest.raises(IdentityError, match=f"(?s){message}"):
        ModelIdentity.from_folder(model)


def test_a_subfolder_that_cannot_be_listed_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: permissions do not stop a test that runs as root."""
    hidden = model / "shards"
    hidden.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path) == hidden:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(IdentityError, match=r"cannot list .*shards \(Permission denied\)"):
        weights_fingerprint(model)


def test_a_file_or_an_unknown_check_is_refused(model: Path) -> None:
    with pytest.raises(IdentityError, match="is a file; give the folder"):
        ModelIdentity.from_folder(model / "config.json")
    with pytest.raises(IdentityError, match="use 'sampled' or 'full'"):
        weights_fingerprint(model, check="quick")  # type: ignore[arg-type]


def test_needs_only_the_standard_library() -> None:
    code = (
        "import sys, prefixstore.identity\n"
        "print(sorted({'numpy', 'torch', 'vllm', 'transformers', 'lmdb'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
