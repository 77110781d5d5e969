"""RE-ARC: what becomes a task, and what must not."""

import importlib.metadata
import random
import sys

import numpy as np
import pytest
from test_pipeline import documents
from tiny import digest

import prepare
from smol import arc, curate, rearc, snapshots, sources, suites, units

needs_package = pytest.mark.skipif(rearc.installed() is None, reason=f"without {rearc.INSTALL}")


# ---- one family of our own: the input turned over


def flip(chance, low, high):
    side = 2 + round(chance.uniform(low, high) * 8)
    grid = tuple(tuple(chance.randint(0, 9) for _ in range(side)) for _ in range(side))
    return {"input": grid, "output": grid[::-1]}


@pytest.fixture
def family(monkeypatch):
    """Sets the generator and the verifier of the only family there is."""

    def replace(generate=flip, verify=lambda grid: grid[::-1]):
        monkeypatch.setattr(rearc, "families", lambda: {"f": (generate, verify)})

    replace()
    return replace


def make(seed=0, n_pairs=4, difficulty=(0, 0.3), tokens=1024):
    return rearc.task(np.random.default_rng(seed), "f", n_pairs, difficulty, tokens)


def test_a_task_has_the_pairs_that_were_asked_for(family):
    task = make()
    pairs = task.train + task.test
    assert (task.id, task.kind, len(task.train), len(task.test)) == ("f", "arc", 3, 1)
    assert all(np.array_equal(x[::-1], y) for x, y in pairs)
    assert len({x.tobytes() for x, _ in pairs}) == 4
    assert digest([make()]) == digest([task]) != digest([make(seed=1)])
    assert max(x.shape[0] for x, _ in make(difficulty=(1, 1)).train) == 10 > max(x.shape[0] for x, _ in pairs)


@pytest.mark.parametrize("tokens, most", [(60, 4), (40, 3)])
def test_a_task_fits(family, tokens, most):
    for seed in range(20):
        task = make(seed, tokens=tokens)
        if task:
            assert len(arc.encode("arc", task.train + task.test)) <= tokens
            assert 3 <= len(task.train) + 1 <= most
    assert make(tokens=30) is None


def test_a_pair_that_its_verifier_does_not_confirm_is_in_no_task(family):
    """It is drawn anew; where all of them are wrong, there is no task."""
    family(verify=lambda grid: grid[::-1] if grid[0][0] % 2 else grid)
    tasks = [task for task in map(make, range(20)) if task]
    assert tasks and all(x[0, 0] % 2 for task in tasks for x, _ in task.train + task.test)
    family(verify=lambda grid: ((0,),))
    assert make() is None


def test_generators_that_fail_or_do_not_end_cost_a_pair(family):
    def careless(chance, low, high):
        made = flip(chance, low, high)
        if made["input"][0][0] == 0:
            raise StopIteration
        if made["input"][0][0] == 1:
            return {"input": ((1,) * 31,), "output": ((1,),)}  # too wide
        while made["input"][0][0] == 2:
            chance.random()
        return made

    family(careless)
    tasks = [make(seed) for seed in range(10)]
    assert all(x[0, 0] > 2 for task in tasks for x, _ in task.train + task.test)


def test_pairs_that_change_nothing_or_come_twice_are_left_out(family):
    def same(*chance):
        grid = flip(*chance)["input"]
        return {"input": grid, "output": grid}

    family(same, lambda grid: grid)
    assert make() is None
    family(lambda chance, low, high: {"input": ((1, 2),), "output": ((2, 1),)}, lambda grid: ((2, 1),))
    assert make() is None


def test_chance_is_that_of_python_and_counted():
    def draw(chance):
        return [chance.random(), chance.choice("abc"), chance.sample(range(99), 5), chance.uniform(0, 2)]

    ours = rearc.Draws(7)
    assert draw(ours) == draw(random.Random(7)) and ours.left < rearc.MOST_DRAWS
    ours.left = 3
    with pytest.raises(ValueError, match="too many random numbers"):
        ours.sample(range(99), 5)


# ---- without the package


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(rearc, "installed", lambda: None)


def test_without_the_package_one_line_says_how_to_get_it(no_package, tmp_path):
    with pytest.raises(ValueError, match="pip install --no-deps reasoning-gym=="):
        suites.names("rearc")
    assert "rearc" not in suites.default()
    for words in (["arc_cpu"], ["show", "rearc"]):
        with pytest.raises(SystemExit, match="pip install --no-deps reasoning-gym==") as error:
            prepare.main([*words, f"--data_dir={tmp_path}"])
        assert "\n" not in str(error.value)


def test_another_version_is_as_good_as_none(monkeypatch):
    for version, found in (("0.1.24", None), ("0.1.25", "0.1.25")):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert rearc.installed() == found


def test_without_the_package_the_other_stages_are_built_without_it(no_package, tmp_path, capsys):
    prepare.main(["stage1", "--sources=arc,rearc", "--dry_run=True", f"--data_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "note: rearc: not installed (pip install --no-deps reasoning-gym==" in printed
    assert "arc               arc     100.0%" in printed


# ---- with it


@needs_package
def test_the_suite_is_what_it_has_always_been():
    """In every process. Another digest means that figures of before and after cannot be compared."""
    tasks = suites.load("rearc")
    assert (len(tasks), digest(tasks)) == (361, "1ad272ff9db44fca")
    trained, evaluation = {*arc.tasks_in("arc1_train")}, {task.id for task in arc.evaluation_tasks()}
    assert {task.id for task in tasks} <= trained and not trained & evaluation
    held = curate.HeldOut(["rearc"])  # so the source "arc" need not be searched for these
    assert not any(held.has(task, "arc") for task in sources.arc_tasks())
    assert all(len(arc.encode("arc", task.train + task.test)) <= 1024 for task in tasks)


@needs_package
def test_the_rest_of_the_package_is_not_imported():
    rearc.families()
    assert "reasoning_gym" not in sys.modules


@needs_package
def test_tasks_in_one_row_follow_their_rules():
    """Two rules written down once more, and what holds for all."""
    rules = {"gravity_right": lambda row: sorted(row, key=lambda c: c == 0)}  # to the left, as it is there
    rules["move_2pix_colorful_left"] = lambda row: np.roll(row, -2).tolist()
    checked = set()
    for i in range(400):
        task = rearc.task_in_one_row(np.random.default_rng(i), 4)
        pairs = task.train + task.test
        assert len({x.tobytes() for x, _ in pairs}) == 4
        for x, y in pairs:
            assert x.shape == y.shape == pairs[0][0].shape and x.shape[0] == 1 and 10 <= x.shape[1] <= 30
            assert not np.array_equal(x, y)
            if task.id in rules:
                assert rules[task.id](x[0].tolist()) == y[0].tolist()
                checked.add(task.id)
    assert checked == {*rules}
    named = [sources.to_document("arc_1d", (np.random.default_rng(0), i)).id for i in range(3)]
    assert len(set(named)) == 3  # the split is by task: of 70 kinds hardly one would be validated on
    assert digest([task]) == digest([rearc.task_in_one_row(np.random.default_rng(i), 4)])


def solved_by(pairs, families):
    """The ids of the families whose verifier gives the output of every pair."""

    def solves(verify):
        try:
            return all(np.array_equal(verify(tuple(map(tuple, x.tolist()))), y) for x, y in pairs)
        except Exception:  # noqa: BLE001 (it is another task's)
            return False

    return {i for i, (_, verify) in families.items() if solves(verify)}


@needs_package
def test_a_stage_of_it_is_rebuilt_byte_for_byte_and_keeps_held_out_pairs_out(tmp_path, monkeypatch):
    few = dict(list(rearc.families().items())[:12])
    monkeypatch.setattr(rearc, "families", lambda: few)
    suites.load.cache_clear()
    curate.HELD_OUT.clear()
    manifests = []
    for folder in ("a", "b"):
        data = tmp_path / folder
        prepare.main(["arc_cpu", f"--data_dir={data}", "--limit_mb=0.1", "--val_every=4", "--num_proc=1"])
        manifests.append((data / "stages/arc_cpu/manifest.jsonl").read_bytes())
    assert manifests[0] == manifests[1]
    found = {"train": [], "val": []}
    for source, split, tokens in documents(data, stage="arc_cpu"):
        found[split].append(arc.decode(tokens)[1])
        assert source == "rearc"
    held = {arc.canonical_hash(*task.test[0]) for task in suites.load("rearc")}
    assert {arc.canonical_hash(*pairs[-1]) for pairs in found["val"]} <= held
    trained = {arc.canonical_hash(*pair) for pairs in found["train"] for pair in pairs}
    assert trained and not trained & held
    # a family is on the side of the split that its original is on
    away = {i for i in few if units.hash64(i.encode()) % 4 == 0}
    dropped = snapshots.read_json(data / "metadata/arc_cpu/filters.json")["rearc"]["dropped"]
    assert away and dropped["held_out_task"]["count"] > 0
    assert all(solved_by(pairs, few) - away for pairs in found["train"])
    suites.load.cache_clear()
    curate.HELD_OUT.clear()


@needs_package
def test_a_family_is_not_trained_on_where_its_original_is_validated_on(data):
    """In a stage of both: by the programs that solve the tasks, whatever their documents look like."""
    validated = set()
    for _, _, ids in documents(data, "arc", "val", "demo"):
        validated |= solved_by(arc.decode(ids)[1], rearc.families())
    trained = [arc.decode(ids)[1] for _, _, ids in documents(data, "rearc", "train", "demo")]
    families = {i: rearc.families()[i] for i in validated}
    assert families and trained and not any(solved_by(pairs, families) for pairs in trained)
