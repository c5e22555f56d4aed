"""Active learning: what is acquired, and curves that do not depend on how often they were interrupted."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bbb_fast
from bbb_fast import Ensemble, predictive
from bbb_fast.cli import main
from bbb_fast.experiments import active
from bbb_fast.experiments.document import read
from bbb_fast.experiments.options import OptionError

pytestmark = pytest.mark.cpu_only("the command runs on the CPU")

SETTINGS: dict[str, Any] = {
    "dataset": "digits", "data_dir": None, "valid_size": 100, "judge": "validation", "start": 20, "step": 10,
    "labels": 45, "pool": 60, "power": 2.0, "draws": 3, "method": "mc-dropout", "first_steps": 3, "steps": 2,
    "from_scratch": False, "batch_size": 16, "lr": 0.005, "kl_weight": 0.03, "dropout": 0.4, "members": 2,
}  # fmt: skip
# Of the command; all that is not here has its default.
SMALL = [
    "active", "--labels", "40", "--pool", "30", "--draws", "2", "--first-steps", "2", "--steps", "2",
    "--valid-size", "1300", "--judge", "validation", "--threads", "1",
]  # fmt: skip


class Says(nn.Module):
    """A member that has one opinion of every input, whose row says which."""

    def __init__(self, probs: list[tuple[float, ...]]) -> None:
        super().__init__()
        self.logits: Tensor
        self.register_buffer("logits", torch.tensor(probs).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x.long().flatten()]


# Of four classes.
SURE, OTHER, HALF = (1.0, 1e-30, 1e-30, 1e-30), (1e-30, 1.0, 1e-30, 1e-30), (0.5, 0.5, 1e-30, 1e-30)
EVEN = (0.25,) * 4


class TestScores:
    @staticmethod
    def scores(name: str) -> list[float]:
        members = Ensemble([Says([SURE, HALF, EVEN]), Says([OTHER, HALF, SURE])])
        said = predictive(members, torch.arange(3.0)[:, None], 2, seed=0)
        return active.SCORES[name](said).tolist()

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            # Members that contradict each other; that agree on a coin's toss; one knows and one does not.
            ("mutual-information", [math.log(2), 0.0, None]),
            ("entropy", [math.log(2), math.log(2), None]),
            ("variation-ratio", [0.5, 0.5, 0.375]),
        ],
    )
    def test_closed_forms(self, name: str, expected: list[float | None]) -> None:
        mean = [0.625, 0.125, 0.125, 0.125]
        entropy = -sum(p * math.log(p) for p in mean)
        last = {"mutual-information": entropy - math.log(4) / 2, "entropy": entropy}
        wanted = [last[name] if value is None else value for value in expected]
        assert self.scores(name) == pytest.approx(wanted, abs=1e-6)

    def test_random_has_no_score(self) -> None:
        assert set(active.ACQUISITIONS) == {*active.SCORES, active.RANDOM}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestAcquire:
    def test_the_highest_scores_first(self) -> None:
        taken = active.acquire(lambda index: -(index - 5.2).abs(), 10, [5], 3, 10, generator())
        assert taken == [6, 4, 7]

    def test_nothing_twice_and_nothing_labelled(self) -> None:
        labelled: list[int] = [3, 4]
        for k in range(5):
            labelled += active.acquire(lambda index: index.double(), 12, labelled, 2, 6, generator(k))
        assert sorted(labelled) == list(range(12))
        assert active.acquire(None, 12, labelled, 2, 6, generator()) == []

    def test_candidates_are_drawn_anew(self) -> None:
        seen = []

        def score(index: Tensor) -> Tensor:
            seen.append(set(index.tolist()))
            return index.double()

        for seed in (0, 1):
            active.acquire(score, 100, [], 1, 20, generator(seed))
        assert [len(some) for some in seen] == [20, 20]
        assert seen[0] != seen[1]

    def test_at_random_any(self) -> None:
        counts = torch.zeros(5)
        for seed in range(400):
            counts[active.acquire(None, 5, [2], 1, 5, generator(seed))] += 1
        assert counts[2] == 0
        assert counts[[0, 1, 3, 4]].min() > 60

    def test_a_power_draws_in_proportion(self) -> None:
        scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
        counts = torch.zeros(4)
        for seed in range(1000):
            counts[active.acquire(lambda index: scores[index], 4, [], 1, 4, generator(seed), 2.0)] += 1
        # In 1000 draws a share has a deviation of at most 0.016.
        assert counts[0] == 0
        torch.testing.assert_close(counts / 1000, torch.tensor([0.0, 1, 4, 9]) / 14, atol=0.06, rtol=0)

    def test_a_power_draws_nothing_twice(self) -> None:
        taken = active.acquire(lambda index: index.double(), 9, [2], 8, 9, generator(), 1.0)
        assert sorted(taken) == [0, 1, 3, 4, 5, 6, 7, 8]

    def test_a_large_power_takes_the_highest(self) -> None:
        taken = active.acquire(lambda index: index + 1.0, 9, [], 3, 9, generator(), 1e4)
        assert taken == [8, 7, 6]

    @pytest.mark.parametrize(("count", "each"), [(20, [2] * 10), (10, [1] * 10), (23, None)])
    def test_first_labels_are_balanced(self, count: int, each: list[int] | None) -> None:
        labels = torch.arange(10).repeat_interleave(torch.arange(5, 15))
        first = active.first_labels(labels, 10, count, generator())
        assert len(set(first.tolist())) == count
        counts = labels[first].bincount(minlength=10).tolist()
        assert counts == each or (each is None and set(counts) == {2, 3})
        assert first.tolist() != active.first_labels(labels, 10, count, generator(1)).tolist()

    def test_a_class_with_too_few_gives_all(self) -> None:
        labels = torch.tensor([0] * 10 + [1])
        assert labels[active.first_labels(labels, 3, 6, generator())].bincount(minlength=3).tolist() == [
            5,
            1,
            0,
        ]


def learn(folder: Path, acquisition: str = "mutual-information", seed: int = 0, **changes: Any) -> Any:
    pytest.importorskip("sklearn")
    folder.mkdir(exist_ok=True)
    return active.learn(folder, acquisition=acquisition, seed=seed, **SETTINGS | changes)


def rounds(folder: Path) -> dict[str, Any]:
    return torch.load(folder / active.ROUNDS, weights_only=True)


class TestLearn:
    @pytest.mark.parametrize("method", active.METHODS)
    def test_rounds(self, tmp_path: Path, method: str) -> None:
        result = learn(tmp_path, method=method)
        assert result["labels"] == [20, 30, 40, 45]
        assert len(result["accuracy"]) == 4
        assert all(0 <= value <= 1 for value in result["accuracy"])
        labelled = rounds(tmp_path)["labelled"]
        assert len(set(labelled)) == len(labelled) == 45

    @pytest.mark.parametrize(
        ("acquisition", "from_scratch"), [*((name, False) for name in active.ACQUISITIONS), ("entropy", True)]
    )
    def test_interrupted_is_as_if_unbroken(
        self, tmp_path: Path, acquisition: str, from_scratch: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = learn(tmp_path / "whole", acquisition, from_scratch=from_scratch)
        left, train = 2, active.train

        def interrupt(*args: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            train(*args)

        monkeypatch.setattr(active, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "broken", acquisition, from_scratch=from_scratch)
        assert len(rounds(tmp_path / "broken")["accuracy"]) == 2
        monkeypatch.setattr(active, "train", train)
        torch.manual_seed(99)  # whatever has happened meanwhile
        torch.rand(7)
        assert learn(tmp_path / "broken", acquisition, from_scratch=from_scratch) == whole
        kept = [rounds(tmp_path / name) for name in ("broken", "whole")]
        torch.testing.assert_close(*kept, rtol=0, atol=0)

    def test_seeds_and_acquisitions_differ_but_for_the_start(self, tmp_path: Path) -> None:
        tasks = [("mutual-information", 0), ("entropy", 0), ("random", 0), ("random", 1)]
        for acquisition, seed in tasks:
            learn(tmp_path / f"{acquisition}{seed}", acquisition, seed, labels=30)
        of = {task: rounds(tmp_path / f"{task[0]}{task[1]}")["labelled"] for task in tasks}
        assert len({tuple(labelled[:20]) for task, labelled in of.items() if task[1] == 0}) == 1
        assert len({tuple(labelled[:20]) for labelled in of.values()}) == 2
        assert len({tuple(labelled[20:]) for labelled in of.values()}) == 4
        # The first round is the same too: it trains on the same labels.
        first = {rounds(tmp_path / f"{name}0")["accuracy"][0] for name, seed in tasks if seed == 0}
        assert len(first) == 1

    def test_a_round_goes_on_or_starts_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        starts, train = [], active.train

        def seen(model: nn.Module, *args: Any) -> None:
            starts.append(([p.clone() for p in model.parameters()], args[2]))
            train(model, *args)
            starts.append(([p.clone() for p in model.parameters()], args[2]))

        monkeypatch.setattr(active, "train", seen)
        for name, from_scratch in (("on", False), ("anew", True)):
            starts.clear()
            learn(tmp_path / name, "random", labels=30, from_scratch=from_scratch)
            (_, end), (again, _) = (starts[0][0], starts[1][0]), (starts[2][0], starts[3][0])
            same = [torch.equal(a, b) for a, b in zip(end, again, strict=True)]
            assert not any(same) if from_scratch else all(same)
            assert [steps for _, steps in starts[::2]] == ([3, 3] if from_scratch else [3, 2])

    def test_more_steps_learn(self, tmp_path: Path) -> None:
        result = learn(tmp_path, "random", start=200, labels=200, first_steps=100, batch_size=64)
        assert result["accuracy"][0] > 0.7

    @pytest.mark.parametrize(
        "damage",
        [
            lambda kept: kept["labelled"].pop(),
            lambda kept: kept["labelled"].__setitem__(0, kept["labelled"][1]),
            lambda kept: kept["labelled"].__setitem__(0, 10**6),
            lambda kept: kept.pop("accuracy"),
            lambda kept: kept["weights"].popitem(),
            lambda kept: kept.clear(),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, damage: Any) -> None:
        learn(tmp_path, "random", labels=30)
        kept = rounds(tmp_path)
        damage(kept)
        torch.save(kept, tmp_path / active.ROUNDS)
        with pytest.raises(ValueError, match=r"rounds.pt cannot be continued"):
            learn(tmp_path, "random", labels=30)

    def test_a_cut_file_is_named(self, tmp_path: Path) -> None:
        learn(tmp_path, "random", labels=20)
        content = (tmp_path / active.ROUNDS).read_bytes()
        (tmp_path / active.ROUNDS).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"rounds.pt cannot be continued"):
            learn(tmp_path, "random", labels=20)


class TestModel:
    X, Y = torch.linspace(-1, 1, 12 * 32 * 32).reshape(12, 1, 32, 32), torch.arange(12) % 3

    @pytest.mark.parametrize("method", active.METHODS)
    def test_the_means_have_no_noise(self, method: str) -> None:
        model = active.build(3, 1, SETTINGS | {"method": method})
        labels = torch.arange(600) % 3
        x = torch.rand(600, 1, 32, 32)
        first = active.accuracy_of_means(model, x, labels)
        assert first == active.accuracy_of_means(model, x, labels)
        model.eval()
        with bbb_fast.posterior_means():
            output = model(x)
        logits = output[0] if isinstance(output, tuple) else output
        assert first == float((logits.argmax(-1) == labels).double().mean())

    def test_draws_are_of_the_whole_network(self) -> None:
        """What comes before the first dropout is computed once; that changes nothing."""
        settings = SETTINGS | {"draws": 5}
        model = active.build(3, 1, settings).eval()
        said = active.ask(model, self.X, settings, 7)
        whole = predictive(bbb_fast.mc_dropout(model), self.X, 5, seed=7)
        torch.testing.assert_close(said.probs, whole.probs, rtol=1e-5, atol=1e-6)
        assert said.mutual_information.max() > 1e-6

    def test_an_ensemble_asks_each_member_once(self) -> None:
        settings = SETTINGS | {"method": "ensemble", "members": 3}
        model: Any = active.build(3, 1, settings).eval()
        with torch.no_grad():
            probs = torch.stack([member(self.X).softmax(-1) for member in model.members]).mean(0)
        said = active.ask(model, self.X, settings, 0)
        torch.testing.assert_close(said.probs, probs.double(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("method", "matters"), [("lrt", True), ("mc-dropout", False)])
    def test_the_kl_counts_for_bayesian_layers(self, method: str, matters: bool) -> None:
        trained = []
        for weight in (0.0, 10.0):
            settings = SETTINGS | {"method": method, "kl_weight": weight}
            torch.manual_seed(0)
            model = active.build(3, 1, settings)
            active.train(model, self.X, self.Y, 2, settings)
            trained.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*trained) != matters

    def test_the_steps_are_as_many_as_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = []
        adam = torch.optim.Adam
        monkeypatch.setattr(adam, "step", lambda self, *_: steps.append(self.param_groups[0]["lr"]))
        settings = SETTINGS | {"batch_size": 5, "method": "ensemble", "members": 2}
        active.train(active.build(3, 1, settings), self.X, self.Y, 7, settings)
        assert len(steps) == 14
        # Each member's learning rate falls from the one given.
        assert steps[0] == steps[7] == 0.005
        assert sorted(steps[:7], reverse=True) == steps[:7]


OF_ALL = {"dataset": "digits", "method": "lrt", "judge": "test", "pool": 9, "steps": 5, "from_scratch": False}


class TestDocument:
    def test_labels_needed(self) -> None:
        assert active.labels_needed([20, 30, 40], [0.5, 0.9, 0.8], 0.9) == 30
        assert active.labels_needed([20, 30, 40], [0.5, 0.9, 0.95], 0.92) == 40
        assert active.labels_needed([20, 30, 40], [0.5, 0.9, 0.8], 0.91) is None

    def test_tables(self) -> None:
        curves: dict[str, list[dict[str, Any]]] = {
            name: [
                {"labels": [20, 30], "accuracy": [0.5, high]},
                {"labels": [20, 30], "accuracy": [0.7, high]},
            ]
            for name, high in (("mutual-information", 0.9), ("random", 0.75))
        }
        settings = {**OF_ALL, "seeds": 2, "accuracies": [0.6, 0.8]}
        made = active.document(settings, curves, 100, 50, 1.0)
        needed, reached = made.tables
        assert [list(row) for row in needed.rows] == [
            ["mutual-information", 20, 30], ["random", 20, None],
        ]  # fmt: skip
        assert [list(row) for row in reached.rows] == [
            ["mutual-information", "60.00 ± 10.00", "90.00 ± 0.00"],
            ["random", "60.00 ± 10.00", "75.00 ± 0.00"],
        ]  # fmt: skip
        assert made.results["curves"] == curves

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bbb_fast.experiments.active_plots", None)
        curve: dict[str, Any] = {"labels": [20], "accuracy": [0.5]}
        made = active.document({**OF_ALL, "seeds": 1, "accuracies": [0.6]}, {"random": [curve]}, 100, 50, 1.0)
        assert made.figures == []
        assert any("matplotlib is missing" in note for note in made.notes)


class TestCommand:
    def test_it_writes_its_document(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
        out = tmp_path / "run"
        command = [*SMALL, "--seeds", "2", "--acquisitions", "random", "entropy", "--out", str(out)]
        assert main(command) == 0
        text = capsys.readouterr().out
        assert "Labels needed for an accuracy" in text
        made = read(out / "active.json")
        assert made.settings["steps"] == 2
        assert made.settings["lr"] == 0.002
        assert made.figures[0].png.startswith(b"\x89PNG")
        assert sorted(path.name for path in (out / "tasks").iterdir()) == [
            "entropy-0", "entropy-1", "random-0", "random-1",
        ]  # fmt: skip
        # Done again, from the tasks' files: the same.
        (out / "tasks" / "entropy-1" / "result.json").unlink()
        assert main([*command, "--resume"]) == 0
        again = read(out / "active.json")
        assert (again.tables, again.results) == (made.tables, made.results)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--labels", "10"], "--labels must be at least --start, 20, got 10"),
            (["--labels", "1000"], "--labels must be at most the images of the pool, 137, got 1000"),
            (["--pool", "5"], "--pool must be at least --step, 10, got 5"),
            (["--step", "0"], "--step must be an int >= 1, got 0"),
            (["--seeds", "-1"], "--seeds must be an int >= 1, got -1"),
            (["--draws", "0"], "--draws must be an int >= 1"),
            (["--lr", "0"], "--lr must be a finite number > 0, got 0.0"),
            (["--lr", "nan"], "--lr must be a finite number > 0, got nan"),
            (["--kl-weight", "-1"], "--kl-weight must be a finite number >= 0, got -1.0"),
            (["--power", "0"], "--power must be a finite number > 0, or highest, got 0.0"),
            (["--power", "nan"], "--power must be a finite number > 0, or highest, got nan"),
            (["--dropout", "1"], "--dropout must be in (0, 1), got 1.0"),
            (["--accuracies", "92"], "--accuracies must be in (0, 1), got 92.0"),
            (["--accuracies", "0.9", "0.9"], "--accuracies must differ, got 0.9, 0.9"),
            (["--acquisitions", "random", "random"], "--acquisitions must differ, got random, random"),
            (["--method", "ensemble", "--members", "1"], "--members must be at least 2, got 1"),
            (["--dataset", "mnist"], "mnist needs a folder: pass --data-dir"),
            (["--valid-size", "5000"], "cannot hold out 5000 of 1437"),
            (["--resume"], "nothing to resume"),
            (["--seed", "-1"], "--seed must be an int >= 0, got -1"),
        ],
    )
    def test_wrong_options_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        pytest.importorskip("sklearn")
        assert main([*SMALL, "--out", str(tmp_path / "run"), *options]) == 1
        err = capsys.readouterr().err
        assert err.startswith("bbb-fast: error: ")
        assert err.count("\n") == 1
        assert message in err
        assert not (tmp_path / "run" / "active.json").exists()

    @pytest.mark.parametrize("options", [["--acquisitions", "bald"], ["--power", "all"]])
    def test_usage(self, options: list[str]) -> None:
        with pytest.raises(SystemExit):
            main(["active", *options])

    def test_the_library_raises_what_the_command_says(self) -> None:
        settings = {**SETTINGS, "seeds": 1, "acquisitions": ["random"], "accuracies": [0.9]}
        active.check(settings)
        with pytest.raises(OptionError, match="dropout must be in"):
            active.check({**settings, "dropout": 0.0})
