from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fundusfm
from fundusfm import cli
from fundusfm.__main__ import main
from fundusfm.errors import UserError
from fundusfm.shards.index import ShardIndex

TINY = Path(__file__).parents[1] / "recipes" / "ret_clip_tiny.yaml"
SHOW = "fundusfm.recipe.show:show_recipe"


def run(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments))
    return int(ended.value.code or 0)


def stand_in(monkeypatch: pytest.MonkeyPatch, target: str, answer: Any = None) -> list[tuple[Any, Any]]:
    """Replace `module:function` by one that notes its arguments and answers or raises `answer`."""
    module, _, name = target.partition(":")
    calls: list[tuple[Any, Any]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(importlib.import_module(module), name, noted)
    return calls


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from fundusfm.__main__ import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: "
    code += "assert not {'torch', 'numpy', 'pandas', 'omegaconf'} & set(sys.modules), 'slow'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "pretrain" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "module",
    ["shards.build", "shards.check", "shards.stats", "shards.adopt", "shards.synth", "stream.vocabulary"],
)
def test_cohort_commands_do_not_wait_for_torch(module: str) -> None:
    code = f"import sys, fundusfm.{module}; assert 'torch' not in sys.modules, 'slow'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{fundusfm.__version__}\n"


def test_user_error__message_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a very long path " * 20 + "[red]not markup[/red]"
    stand_in(monkeypatch, SHOW, UserError("wrong", where=long, fix="mend it"))
    assert run("recipe", "show", str(TINY)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: wrong\n  where: {long}\n  to do: mend it\n"


def test_interrupt__one_line_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, SHOW, KeyboardInterrupt())
    assert run("recipe", "show", str(TINY)) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_interrupt__while_importing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "fundusfm.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fundusfm.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_bug__traceback_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, SHOW, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.app(["recipe", "show", str(TINY)])
    code = "import fundusfm.cli as c\n@c.app.command('bug')\ndef bug(): 1 / 0\nc.app(['bug'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)") and "ZeroDivisionError" in done.stderr


def test_broken_pipe__quiet() -> None:
    code = "import sys, fundusfm.cli as c\n@c.app.command('many')\ndef many():\n"
    code += "    for _ in range(100000): sys.stdout.write('line\\n')\nc.app(['many'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "pretrain",
        "shards build x",
        "shards build x --out y --size big",
        "shards build x --out y --crop half",
        "shards synth --out x --patients 0",
    ],
)
def test_wrong_usage__2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments.split()) == 2
    assert "Usage" in capsys.readouterr().err


def test_recipe_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "show", str(TINY), "trainer.max_steps=733", "seed=5") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainer.max_steps", "733", "command", "line"] in lines and [
        "seed",
        "5",
        "command",
        "line",
    ] in lines


def test_recipe_diff(capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides hold for both sides, so that recipes that leave values open can be compared."""
    folder = TINY.parent
    given = ["data.sources=[{shards: x}]", "data.tokenizer=x", "trainer.max_exams=99000", "name=n"]
    assert run("recipe", "diff", str(folder / "base.yaml"), str(folder / "ret_clip.yaml"), *given) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainer.precision", "fp32", "bf16"] in lines and not any(line[0] == "name" for line in lines)
    assert run("recipe", "diff", str(folder / "base.yaml"), str(TINY)) == 2
    assert "must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["x.yaml", "trainer.max_steps=10", "optim.lr=1", "--resume"],
        ["--resume", "x.yaml", "trainer.max_steps=10", "optim.lr=1"],
        ["x.yaml", "trainer.max_steps=10", "--resume", "optim.lr=1"],
    ],
)
def test_pretrain__options_anywhere(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    calls = stand_in(monkeypatch, "fundusfm.training.fit:pretrain", SimpleNamespace(signal_number=None))
    assert run("pretrain", *arguments) == 0
    assert calls == [
        (
            (Path("x.yaml"), ["trainer.max_steps=10", "optim.lr=1"]),
            {"resume": True, "resume_if_any": False, "fork": None},
        )
    ]


def test_pretrain__stopped_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "fundusfm.training.fit:pretrain", SimpleNamespace(signal_number=15))
    assert run("pretrain", "x.yaml") == 143
    assert calls == [((Path("x.yaml"), ()), {"resume": False, "resume_if_any": False, "fork": None})]


BUILT = ShardIndex(root="out", name="x", shards=())
VERBS: list[tuple[str, str, Any, tuple[Any, ...], dict[str, Any]]] = [
    (
        "shards build card.yaml --out o --workers 3",
        "fundusfm.shards.build:build_shards",
        BUILT,
        (Path("card.yaml"), Path("o")),
        {"size": 512, "workers": 3, "max_rejects": 0.01, "exams_per_shard": 512, "key": None, "crop": None},
    ),
    (
        "shards build t --out o --workers 1 --size 64 --max-rejects 0 --exams-per-shard 9 --key k --crop fov",
        "fundusfm.shards.build:build_shards",
        BUILT,
        (Path("t"), Path("o")),
        {"size": 64, "workers": 1, "max_rejects": 0, "exams_per_shard": 9, "key": Path("k"), "crop": "fov"},
    ),
    (
        "shards check d --workers 2",
        "fundusfm.shards.check:check_shards",
        SimpleNamespace(problems=()),
        ("d",),
        {"workers": 2},
    ),
    (
        "shards stats d --sheet s.png",
        "fundusfm.shards.stats:show_stats",
        None,
        ("d",),
        {"sheet": Path("s.png")},
    ),
    (
        "shards adopt d --workers 2 --split val --out o",
        "fundusfm.shards.adopt:adopt_shards",
        BUILT,
        (Path("d"),),
        {"out": Path("o"), "split": "val", "workers": 2},
    ),
    (
        "shards synth --out o --patients 7 --seed 3 --size 64 --workers 2",
        "fundusfm.shards.synth:synthesise",
        BUILT,
        (Path("o"),),
        {"patients": 7, "seed": 3, "size": 64, "workers": 2, "exams_per_shard": 512},
    ),
    (
        "tokens train --shards a --shards b --out t.json --vocab-size 99",
        "fundusfm.stream.vocabulary:train_tokenizer",
        42,
        (["a", "b"], Path("t.json")),
        {"vocab_size": 99},
    ),
    (
        "compare runs/a runs/b --out o",
        "fundusfm.evaluation.compare:compare",
        Path("comparison.html"),
        ([Path("runs/a"), Path("runs/b")], Path("o")),
        {},
    ),
    (
        "evaluate c --shards d --out o --workers 0 --batch-size 8 --shots 4",
        "fundusfm.evaluation.evaluate:evaluate",
        Path("report.html"),
        (Path("c"), "d"),
        {"out": Path("o"), "batch_size": 8, "shots": 4, "workers": 0},
    ),
]


@pytest.mark.parametrize(
    ("line", "target", "answer", "args", "kwargs"), VERBS, ids=[verb[0] for verb in VERBS]
)
def test_verbs_call_their_rooms(
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    target: str,
    answer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    module, _, name = target.partition(":")
    inspect.signature(getattr(importlib.import_module(module), name)).bind(*args, **kwargs)
    calls = stand_in(monkeypatch, target, answer)
    assert run(*line.split()) == 0
    assert calls == [(args, kwargs)]


def test_defaults_are_those_of_the_rooms() -> None:
    from fundusfm.shards.build import IMAGE_SIZE
    from fundusfm.shards.writer import EXAMS_PER_SHARD, MAX_REJECTS

    defaults = {name: one.default for name, one in inspect.signature(cli.shards_build).parameters.items()}
    chosen = (defaults["size"], defaults["exams_per_shard"], defaults["max_rejects"])
    assert chosen == (IMAGE_SIZE, EXAMS_PER_SHARD, MAX_REJECTS)


def test_shards_check__problems_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = SimpleNamespace(problems=("train-000000.tar: torn [at] 5", "val-000000.tar: gone"))
    stand_in(monkeypatch, "fundusfm.shards.check:check_shards", report)
    assert run("shards", "check", "d") == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == list(report.problems) and "2 problems" in err


def test_weights_import__accounts_for_every_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = SimpleNamespace(
        matched={"visual.proj": "vision.proj.weight"}, ignored=["bert.pooler.x"], absent=["decoder"]
    )
    calls = stand_in(monkeypatch, "fundusfm.models.published:import_weights", audit)
    assert run("weights", "import", "ret_clip", "f.pt", "--out", "o") == 0
    assert calls == [(("ret_clip", Path("f.pt"), Path("o")), {})]
    out = capsys.readouterr().out
    assert "visual.proj -> vision.proj.weight\n" in out and "bert.pooler.x is not used\n" in out


def test_recipe_folder__where_the_run_will_lie(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipe", "folder", str(TINY), "runs_dir=elsewhere", "name=mine") == 0
    assert capsys.readouterr().out == "elsewhere/mine\n"
    assert run("recipe", "folder", str(TINY), "trainer.device=toaster") == 2


def test_shards_build__a_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "fundusfm.shards.build:build_part", 7)
    assert run("shards", "build", "t.csv", "--out", "there", "--part", "2/3", "--size", "64") == 0
    (arguments, options) = calls[0]
    assert (str(arguments[2]), options["size"]) == ("Part(number=2, count=3)", 64)
    assert "7 shards of part 2/3 are built, not published" in capsys.readouterr().out
    assert run("shards", "build", "t.csv", "--out", "there", "--part", "4/3") == 2
