"""The command line on a small random model: what it prints, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from pie import ConfigError, info, memory
from pie.cli import main

PROMPT = " ".join(f"w{n % 90 + 3}" for n in range(700))  # more than one chunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama whose words are w3 to w94."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=95,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 95)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


class Command:
    """Runs `pie generate` in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        common = ["generate", "--model", str(self.folder), "--dtype", "f32"]
        try:
            code = main([*common, *arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *self.capsys.readouterr()

    def json(self, *arguments: str) -> dict:
        code, out, _ = self("--json", *arguments)
        assert code == 0
        return json.loads(out)


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(folder, capsys)


def greedy(folder: Path, prompt: str, new: int) -> list[int]:
    """The tokens of transformers by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()


def test_text_and_summary(command: Command) -> None:
    code, out, err = command("--prompt", PROMPT, "--max-new-tokens", "9")
    assert code == 0
    assert out == " ".join(f"w{token}" for token in greedy(command.folder, PROMPT, 9)) + "\n"
    assert "prompt 512/700 tokens" in err
    assert "prompt 700/700 tokens" in err
    last = err.splitlines()[-1]
    for what in (
        "9 tokens",
        "tokens/s",
        "stalled",
        "device",
        "pool 0 B at peak (none)",
        "streamed",
    ):
        assert what in last


def test_everything_fits_without_a_budget(command: Command) -> None:
    result = command.json("--prompt", PROMPT, "--max-new-tokens", "20")
    assert result["token_ids"] == greedy(command.folder, PROMPT, 20)
    stats = result["stats"]
    assert stats["pool_io"] == "none"
    assert stats["policy"] == "off"
    assert stats["pool_bytes_peak"] == stats["streamed_bytes"] == stats["written_bytes"] == 0
    assert stats["device_bytes_peak"] >= stats["kv_bytes"] > 0
    assert stats["stall_fraction"] == 0
    assert stats["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("policy", [[], ["--policy", "fixed:1"]])
def test_budget_below_the_need(command: Command, tmp_path: Path, policy: list[str]) -> None:
    options = ["--kv-device", "256KiB", "--kv-pool", "16MiB", "--pool-dir", str(tmp_path), *policy]
    result = command.json("--prompt", PROMPT, "--max-new-tokens", "40", *options)
    assert result["token_ids"] == greedy(command.folder, PROMPT, 40)
    assert result["text"] == " ".join(f"w{token}" for token in result["token_ids"])
    stats = result["stats"]
    assert 0 < stats["device_bytes_peak"] <= 256 << 10
    assert stats["kv_bytes"] > stats["device_bytes_peak"]
    assert stats["pool_bytes_peak"] > 0
    assert stats["streamed_bytes"] > stats["written_bytes"] > 0
    assert 0 <= stats["stall_fraction"] <= 1


def test_what_happened_is_written(command: Command, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "report.html"
    options = ["--kv-device", "256KiB", "--kv-pool", "16MiB", "--pool-dir", str(tmp_path)]
    options += ["--trace", str(trace), "--report", str(page)]
    result = command.json("--prompt", PROMPT, "--max-new-tokens", "9", *options)
    assert result["token_ids"] == greedy(command.folder, PROMPT, 9)
    records = json.loads(trace.read_text())["traceEvents"]
    assert sum(record.get("cat") == "step" for record in records) == result["stats"]["steps"]
    assert page.read_text().count("<svg") == 4


@pytest.mark.parametrize("option", ["--trace", "--report"])
def test_what_cannot_be_written_is_refused_before(command: Command, option: str) -> None:
    code, out, err = command("--prompt", "w7", option, "/nowhere/at/all")
    assert (code, out) == (2, "")
    assert err == f"pie: {option} /nowhere/at/all cannot be written: No such file or directory.\n"


def test_a_refused_command_leaves_no_file(command: Command, tmp_path: Path) -> None:
    files = [tmp_path / "trace.json", tmp_path / "report.html"]
    options = ["--trace", str(files[0]), "--report", str(files[1]), "--model", "/no/model"]
    assert command("--prompt", "w7", *options)[0] == 2
    assert not any(file.exists() for file in files)


def test_sampling_is_seeded(command: Command) -> None:
    options = ["--prompt", "w7 w8", "--max-new-tokens", "30", "--temperature", "1.5"]
    first, again, other = (command.json(*options, "--seed", seed) for seed in "112")
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    narrow = command.json(*options, "--top-p", "1e-9")
    assert narrow["token_ids"] == greedy(command.folder, "w7 w8", 30)


def test_stops_at_the_end_token(command: Command, folder: Path, tmp_path: Path) -> None:
    third = greedy(folder, "w7 w8", 3)[2]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": [2, third]})
    )
    command.folder = tmp_path
    assert command.json("--prompt", "w7 w8")["token_ids"][-1] == third
    assert len(command.json("--prompt", "w7 w8")["token_ids"]) <= 3


def test_prompt_from_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("w7 w8")
    options = ["--max-new-tokens", "5"]
    from_file = command.json("--prompt-file", str(tmp_path / "prompt"), *options)
    assert from_file["token_ids"] == command.json("--prompt", "w7 w8", *options)["token_ids"]


def test_pool_exhausted_in_mid_generation_shows_what_there_is(command: Command) -> None:
    code, out, err = command(
        *("--prompt", "w7", "--max-new-tokens", "1500", "--json"),
        *("--kv-device", "128KiB", "--kv-pool", "128KiB"),
    )
    assert code == 2
    found = json.loads(out)
    assert 100 < len(found["token_ids"]) < 1500
    assert found["stats"]["kv_bytes"] > 100 << 10
    assert "tier" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "w7", "--kv-device", "much"], "--kv-device is 'much', which is not a size"),
        (["--prompt", "w7", "--kv-device", "0"], "--kv-device is '0': give a size of at least"),
        (["--prompt", "w7", "--kv-device=-1"], "--kv-device is '-1', which is not a size"),
        (["--prompt", "w7", "--kv-device", "1KiB"], "device_bytes is 1024"),
        (
            ["--prompt", "w7", "--pool-dir", "/no/dir"],
            "pool_dir '/no/dir' cannot hold the pool file",
        ),
        (["--prompt", "w7", "--kv-device", "100EiB"], "--kv-device is '100EiB': give a size"),
        (["--prompt", "w7", "--kv-device", "1MiB", "--kv-pool", "x"], "--kv-pool is 'x'"),
        (["--prompt", "w7", "--kv-device", "1MiB", "--pool-dir", "/no/dir"], "/no/dir"),
        (["--prompt", "w7", "--kv-device", "1MiB", "--policy", "lru"], "policy 'lru' is unknown"),
        (["--prompt", "w7", "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["--prompt", "w7", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "w7", "--max-new-tokens", "few"], "invalid int value: 'few'"),
        (["--prompt", "w7", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "w7", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "w7", "--model", "/no/model"], "/no/model does not exist"),
        (["--prompt", "w7", "--model", "/"], "/ holds no config.json"),
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt-file", "/no/file"], "/no/file cannot be read"),
        (["--prompt", "w7", "--prompt-file", "x"], "not allowed with"),
        ([], "--prompt --prompt-file is required"),
        (["--prompt", "w7", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_refuses_in_one_sentence(command: Command, arguments: list[str], sentence: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("pie: ")
    assert sentence in last
    assert "Traceback" not in err


def test_more_tokens_than_positions(command: Command, folder: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=95, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    command.folder = tmp_path
    assert len(command.json("--prompt", "w7", "--max-new-tokens", "64")["token_ids"]) == 64
    code, out, err = command("--prompt", "w7", "--max-new-tokens", "65")
    assert (code, out) == (2, "")
    assert "more than the 64 positions that the model has" in err.splitlines()[-1]


def test_more_tokens_than_the_model_was_made_for(command: Command, tmp_path: Path) -> None:
    for file in command.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    command.folder = tmp_path
    with pytest.warns(RuntimeWarning, match="31 tokens, more than the 30"):
        assert len(command.json("--prompt", "w7", "--max-new-tokens", "50")["token_ids"]) == 50


def test_an_empty_prompt_is_none_whatever_the_tokenizer_adds(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command.folder = tmp_path
    code, _, err = command("--prompt", "")
    assert code == 2
    assert "The prompt is empty" in err
    assert command("--prompt", "w7", "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_has_had_enough(folder: Path, form: list[str]) -> None:
    run = [sys.executable, "-m", "pie", "generate", "--model", str(folder), "--dtype", "f32"]
    command = [*run, "--prompt", "w7", "--max-new-tokens", "400", *form]
    reader, writer = os.pipe()
    os.close(reader)  # what `head` does once it has its lines
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert bool(form) or "tokens/s" in done.stderr.splitlines()[-1]


def test_advises_no_foreign_package(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pie.hf", None)
    code, _, err = command("--prompt", "w7")
    assert code == 2
    assert "pip install '.[hf]'" in err
    assert "pie-core[hf]" not in err


def test_prompt_that_is_not_text(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\xff")
    code, _, err = command("--prompt-file", str(tmp_path / "prompt"))
    assert code == 2
    assert "is not UTF-8 text" in err


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", "--pool-dir", str(tmp_path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["cores", "attention", "memory", "disk", "gpu"]
    assert "cgroup" in lines["memory"]
    assert str(tmp_path) in lines["disk"]
    assert list(tmp_path.iterdir()) == []


def test_info_of_a_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model-1.safetensors"
    weights.write_bytes(b"0" * (3 << 20))
    assert main(["info", "--pool-dir", str(tmp_path), "--model", str(tmp_path)]) == 0
    assert "with 3.0 MiB of weights: there is no GPU" in capsys.readouterr().out
    gpu = info.Gpu(16 << 20, 900e9, 50e9, 50e9)
    monkeypatch.setattr(info, "_gpu", lambda: (gpu, "a card"))
    assert main(["info", "--pool-dir", str(tmp_path), "--model", str(weights)]) == 0
    assert "1.07 times the KV with 3.0 MiB of weights, by a pool" in capsys.readouterr().out
    weights.write_bytes(b"0" * (15 << 20))
    (tmp_path / "model-2.safetensors").write_bytes(b"0" * (1 << 20))
    assert main(["info", "--pool-dir", str(tmp_path), "--model", str(tmp_path)]) == 0
    assert "they leave no memory for KV" in capsys.readouterr().out
    assert main(["info", "--pool-dir", str(tmp_path), "--model", str(tmp_path / "none")]) == 2
    assert "give a .gguf file, or a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "weights", "gain"),
    [
        (info.Gpu(int(88.4e9), 3.7e12, 400e9, 400e9), 26e9, 1.18),  # GH200, 13B in 16 bits
        (info.Gpu(int(74.7e9), 2e12, 50e9, 50e9), 16e9, 1.03),  # H100 PCIe, 8B in 16 bits
        (info.Gpu(int(14.7e9), 900e9, 50e9, 50e9), 13e9, 1.84),  # 16 GB, 27B in 3 bits
    ],
)
def test_the_gain_is_what_the_table_says(gpu: info.Gpu, weights: float, gain: float) -> None:
    assert info.expected_gain(gpu, int(weights)) == pytest.approx(gain, abs=0.02)


def test_info_of_a_bad_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("/no/dir", str(tmp_path / "file"), "/dev/shm"):
        assert main(["info", "--pool-dir", name]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"pie: pool_dir '{name}' cannot hold the pool file: ")


def test_info_where_there_is_no_direct_io(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path("/dev/shm").iterdir())
    assert main(["info", "--pool-dir", "tmpfs:/dev/shm"]) == 0
    disk = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("disk"))
    for words in ("/dev/shm, ", "buffered-threads", "cannot be read and written directly", "GB/s"):
        assert words in disk
    assert set(Path("/dev/shm").iterdir()) == before


def test_info_without_a_place_for_a_pool(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise ConfigError("there is no default place")

    monkeypatch.setattr(info._core, "default_pool_dir", refuse)
    assert main(["info"]) == 0
    assert "not usable as a pool: there is no default place" in capsys.readouterr().out


# Who may take how much memory.

MIB = 1 << 20


def write_groups(root: Path, groups: dict[str, dict[str, str]]) -> None:
    for group, files in groups.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / group / name).write_text(text)


@pytest.mark.parametrize(
    ("mine", "groups", "limit", "available"),
    [
        ("0::/", {"": {}}, None, 900),
        ("0::/", {"": {"memory.max": "max\n"}}, None, 900),
        (
            "0::/a/b",
            {
                "a": {
                    "memory.max": f"{500 * MIB}\n",
                    "memory.current": f"{300 * MIB}\n",
                    "memory.stat": f"anon 5\nactive_file {40 * MIB}\ninactive_file {60 * MIB}\n",
                },
                "a/b": {"memory.max": "max\n", "memory.current": f"{200 * MIB}\n"},
            },
            500,
            300,  # page cache can be taken back
        ),
        ("0::/on/the/host", {"": {"memory.max": str(64 * MIB)}}, 64, 64),
        (
            "9:cpu,memory:/job\n0::/",
            {
                "memory": {"memory.limit_in_bytes": str(2**63 - 4096)},
                "memory/job": {
                    "memory.limit_in_bytes": str(400 * MIB),
                    "memory.usage_in_bytes": str(390 * MIB),
                    "memory.stat": f"total_inactive_file {30 * MIB}\ntotal_active_file 0\n",
                },
            },
            400,
            40,
        ),
    ],
)
def test_memory_limits(
    mine: str,
    groups: dict[str, dict[str, str]],
    limit: int | None,
    available: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1024000 kB\nMemAvailable:  921600 kB\nHuge: 0\n")
    (tmp_path / "self").write_text(mine + "\n")
    write_groups(tmp_path / "groups", groups)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUPS_OF_SELF", tmp_path / "self")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.cgroup_limit() == (None if limit is None else limit * MIB)
    assert memory.available_memory() == available * MIB


def test_module_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pie"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pie: ")
