"""Runs by the command line: grids, models of one's own, committed runs, published formats."""

import re
from pathlib import Path

import pytest

for _package in ("torch", "scipy", "filelock", "rich", "pandas", "seaborn", "sklearn"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

from benchmarks.paper import __main__ as cli  # noqa: E402
from benchmarks.paper import data, methods, page, runs, sweep  # noqa: E402
from published import made, write  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "reproduction.md").read_text(encoding="utf-8")
MINE = re.search("<!-- own -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command with `MINE`, and returns what it prints."""
    monkeypatch.setattr(runs, "COMMITTED", tmp_path / "committed")
    tables = [
        (table, {**table}) for table in (methods.METHODS, methods.MODELS, data.MADE, runs.SUITES)
    ]
    own = tmp_path / "mine.py"
    own.write_text(MINE)

    def run(line, text=MINE):
        own.write_text(text)
        line = f"{line} --own {own}" + f" --out {tmp_path}" * ("--out" not in line)
        monkeypatch.setattr("sys.argv", ["paper", *line.split()])
        cli.main()
        return capsys.readouterr().out

    yield run
    for table, kept in tables:
        table.clear()
        table.update(kept)


@pytest.fixture
def here(monkeypatch):
    """Do the runs in this process, for others start slowly; return the list of those done."""
    done = []

    def sweep_here(planned, settings, folder, _, __, source, ___):
        found = []
        for one in planned:
            done.extend([one] * (runs.finished(one, folder) is None))
            found.append(sweep.work(one, settings, folder, source))
        return found

    monkeypatch.setattr(cli, "sweep", sweep_here)
    monkeypatch.setattr(cli.figures, "figures", lambda *_: [])
    sweep.load.cache_clear()
    return done


def test_a_grid_chooses_the_rate_and_the_strength_that_runs_have(command, here, tmp_path):
    with pytest.raises(SystemExit, match="search it first"):
        command("run mine")
    command("search mine")
    assert [(one.rate, one.strength) for one in here] == [
        (0.03, 0),
        (1e-6, 0),
        (0.03, 0.1),
        (0.03, 1e4),
    ]
    assert {(one.batch, one.validate, one.seed) for one in here} == {(45, True, runs.SEARCH_SEED)}
    assert "| tiny | 45 | small 0.1 |" in command(f"table search-mine --out {tmp_path}")
    last = next(tmp_path.glob("search-mine/*small-0.1-*.json"))
    last.rename(tmp_path / "aside")
    with pytest.raises(SystemExit, match="no whole grid"):
        command("run mine")
    (tmp_path / "aside").rename(last)
    del here[:]
    command("run mine --methods vanilla small --seeds 1")
    assert [(one.rate, one.strength) for one in here] == [(0.03, 0.0), (0.03, 0.1)]
    command("run mine --methods small --seeds 1 --strengths small=0.5 --epochs 1")
    assert (here[-1].strength, here[-1].epochs) == (0.5, 1)


def test_ones_own_model_method_and_data_fit_into_fifteen_lines():
    assert sum(bool(line.strip()) for line in MINE.splitlines()) <= 15


def test_committed_runs_are_done_and_fresh_ones_give_the_same(command, here, tmp_path):
    command("search mine")
    command("run mine --methods vanilla --seeds 1")
    command("commit")
    command("run mine --methods vanilla --seeds 2")
    (tmp_path / "one").mkdir()
    del here[:]
    command(f"run mine --methods vanilla --seeds 2 --out {tmp_path / 'one'}")
    assert [one.seed for one in here] == [1]  # the grid and the first seed were committed
    first, _ = runs.committed()["mine"] + [None]
    command(f"run mine --methods vanilla --seeds 2 --fresh --save --out {tmp_path / 'two'}")
    assert [one.seed for one in here] == [1, 0, 1]
    kept = runs.committed()["mine"]
    assert [one.run.seed for one in kept] == [0, 1]
    assert (kept[0].curves, kept[0].final) == (first.curves, first.final)
    assert page.block(kept) in command(f"table mine --out {tmp_path / 'two'}")


def test_each_process_knows_ones_own_and_a_killed_one_is_explained(command):
    killed = MINE.replace("outputs = ", "import os; os.kill(os.getpid(), 9); outputs = ")
    killed = killed.replace('"grid": [[0.03, 1e-6]]', '"rates": [0.03]')
    with pytest.raises(
        SystemExit, match="memory ran out with --workers 1: try fewer, or --micro-b"
    ):
        command("run mine --workers 1 --methods small --seeds 1", killed)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run mine --methods smal", "invalid choice: 'smal'"),
        ("run mine --strengths smal=1", "'smal' is none of"),
        ("run mine --models vg", "invalid choice: 'vg'"),
        ("run other", "invalid choice: 'other'"),
        ("table other", "no results"),
        ("search mine --batches 7", "batch sizes"),
    ],
)
def test_what_is_unknown_is_named(command, capsys, line, says):
    with pytest.raises(SystemExit) as error:
        command(line)
    assert says in str(error.value) + capsys.readouterr().err


SLOW = pytest.param("stl-10", marks=pytest.mark.thorough)  # its images have 27,648 numbers


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100", SLOW])
def test_suites_of_published_formats_run_from_a_folder(command, here, tmp_path, name):
    files, _ = made(name, 16 if name == "cifar-10" else 64)
    write(tmp_path / data.SOURCES[name].unpacked, files)
    text = f"run {name} --data {tmp_path} --models tiny --batches 64 --seeds 1 --epochs 1"
    assert "4 of 4 runs are done" in command(text)
    assert {one.method for one in here} == {*runs.PAPERS}
