"""The CPU benchmarks' own logic: comparisons, memory, tables, contenders. Nothing here looks at a clock."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PACKAGE, repository_root
from torch import nn

from bbb_fast import _backend, functional
from bbb_fast._noise import posterior_means

BENCHMARKS = repository_root() / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import cpu  # noqa: E402
import figures  # noqa: E402
import gpu_page  # noqa: E402
import gpu_report  # noqa: E402
import harness  # noqa: E402
import layers  # noqa: E402
import models  # noqa: E402
import readme  # noqa: E402
import rivals  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402
from cases import CASES, VARIANTS, Case, model_cases  # noqa: E402

LINEAR = Case("linear 6x5, batch 4", 6, 5, 4)
CONV = Case("conv 2-3 k3 p1, 5^2, batch 4", 2, 3, 4, kernel=3, padding=1, size=5)
EFFORT = harness.Effort(rounds=25, seconds=1e9, least=25, warmup=1)


def over(ratio: float, spread: float = 0.01) -> dict[str, float]:
    return {
        "ratio": ratio,
        "low": ratio * (1 - 2 * spread),
        "high": ratio * (1 + 2 * spread),
        "spread": spread,
    }


def result(bbb: float = 1.5, lrt: float = 2.5, spread: float = 0.01, threads: int = 1) -> dict[str, Any]:
    """A result of benchmarks/layers.py with one case."""

    def row(ratio: float, spread: float) -> dict[str, Any]:
        times = {part: harness.summary([ratio * 1e-3] * 3) for part in layers.Times._fields}
        return {
            **times,
            "over_base": over(ratio, spread),
            "lower_over_base": over(ratio, spread),
            "saved_bytes": 16,
            "peak_bytes": 1024,
        }

    table = {
        "case": CASES[0].name,
        "base": "nn",
        "weight_bytes": 0,
        "output_bytes": 0,
        "contenders": {"nn": row(1.0, 0.0), "bbb": row(bbb, spread), "lrt": row(lrt, spread)},
    }
    provenance: dict[str, Any] = {name: "same" for name in compare.SAME}
    provenance |= {
        "python": "3",
        "bbb_fast": "0",
        "commit": "0",
        "uncommitted_changes": False,
        "date": "today",
    }
    return {
        "provenance": {**provenance, "bf16_instructions": True, "threads": [threads], "libraries": {}},
        "quick": False,
        "method": {},
        "contenders": {"nn": "", "bbb": "", "lrt": ""},
        "runs": [{"threads": threads, "sampling": [], "layers": [table]}],
    }


# ---------------------------------------------------------------- the report of a GPU

OF_ONE_PROCESS = """
python_tests/test_a.py::test_x[1-2] PASSED                       [ 25%]
python_tests/test_a.py::test_y FAILED                            [ 50%]
python_tests/test_a.py::test_z SKIPPED (needs two GPUs)          [ 75%]
FAILED python_tests/test_a.py::test_y - AssertionError: no
"""
OF_SEVERAL = """
python_tests/test_a.py::test_x[1-2]
[gw3] [ 25%] PASSED python_tests/test_a.py::test_x[1-2]
[gw11] [100%] FAILED python_tests/test_a.py::test_y
[gw0] [ 75%] SKIPPED python_tests/test_a.py::test_z
"""


@pytest.mark.parametrize("text", [OF_ONE_PROCESS, OF_SEVERAL])
def test_what_tests_said_is_read(text: str) -> None:
    found = gpu_report.what_tests_said(text + "= 1 failed, 1 passed, 1 skipped in 3.21s =\n")
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failures"] == ["python_tests/test_a.py::test_y"]
    assert found["summary"] == "1 failed, 1 passed, 1 skipped in 3.21s"


def test_the_tests_of_a_report_are_there() -> None:
    stage = gpu_report.test_stage("cpu", False, 1.0, Path())
    files = [BENCHMARKS.parent / word for word in stage.command if word.endswith(".py")]
    assert len(files) > 15
    assert all(file.exists() for file in files)


OF_MEMCHECK = """
========= COMPUTE-SANITIZER
sanitize: 2482 cases on cuda, 0 failed
========= ERROR SUMMARY: 0 errors
"""
OF_RACECHECK = """
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at somewhere
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""


def test_what_sanitizers_said_is_read(tmp_path: Path) -> None:
    found = gpu_report.what_sanitizers_said(OF_MEMCHECK)
    assert (found["errors"], found["cases"]) == (0, 2482)
    found = gpu_report.what_sanitizers_said(OF_RACECHECK)
    assert [found[key] for key in ("hazards", "errors", "warnings")] == [3, 1, 2]
    assert found["report"][0] == "Error: Race reported between Write access at somewhere"
    # Errors, or no summary at all, fail the stage even where the command ended with 0.
    for text, status in ((OF_MEMCHECK, "passed"), (OF_RACECHECK, "failed"), ("nothing", "failed")):
        stage = gpu_report.Stage("memcheck", [], 1.0, tmp_path, read=gpu_report.what_sanitizers_said)
        stage.log.write_text(text)
        assert stage.record(0, 1.0)["status"] == status
    stage.log.write_text("Device not supported")
    assert stage.record(1, 1.0)["status"] == "not available"


@pytest.mark.skipif(
    PACKAGE.parent != repository_root(),
    reason="the report is about the package of its tree, not about this one",
)
def test_a_report_needs_kernels() -> None:
    found = gpu_report.probe("cpu")
    assert found["name"] == "cpu"
    assert ("not_native" not in found) == _backend.native_available()
    if not _backend.native_available():
        assert "AssertionError" in found["not_native"]


def test_a_stage_ends_at_its_limit(tmp_path: Path) -> None:
    commands = {"slow": ["sleep", "60"], "bad": ["sh", "-c", "echo no; exit 3"], "good": ["true"]}
    limits = {"slow": 0.5, "bad": 30.0, "good": 30.0}
    stages = [gpu_report.Stage(n, c, limits[n], tmp_path) for n, c in commands.items()]
    found = gpu_report.run_side_by_side(stages)
    assert [record["status"] for record in found.values()] == ["timed out", "failed", "passed"]
    assert found["bad"]["last_lines"] == ["no"]


def gpu_result(of_bare: float, nn_peak: int) -> dict[str, Any]:
    """A result of benchmarks/gpu.py with one layer and one kernel."""

    def row(us: float, peak: int) -> dict[str, Any]:
        return {"forward": {"median_us": us}, "step": {"median_us": us}, "peak_bytes": peak}

    layer = {
        "case": "linear 4096x4096, batch 4096, bf16 autocast", "precision": "autocast",
        "parameter_bytes": 10, "output_bytes": 5,
        "contenders": {
            "lrt": row(100 * of_bare, 100), "bare_lrt": row(100, 0), "nn": row(50, nn_peak),
            "compiled_lrt": row(130, 0), "bbb": {"error": "RuntimeError: no"},
        },
    }  # fmt: skip
    kernel = {
        "case": "KL, 4 elements", "kernel": "KL", "elements": 4,
        "contenders": {"ours": {"median_us": 2.0, "of_copy_bandwidth": 0.75}},
    }  # fmt: skip
    return {"kernels": [kernel], "layers": [layer], "models": [{"case": "m", "skipped": "x"}], "predict": []}


def test_a_gpus_targets_are_judged() -> None:
    found = gpu_page.targets(gpu_result(of_bare=1.2, nn_peak=85), smoke=False)
    assert [target["verdict"] for target in found] == ["missed", "missed", "met", "met", "met"]
    assert found[0]["measured"] == "1 kernels, missed in 1: KL 75 %"
    found = gpu_page.targets(gpu_result(of_bare=1.3, nn_peak=84), smoke=False)
    assert [target["verdict"] for target in found] == ["missed", "missed", "missed", "missed", "missed"]
    page = gpu_page.page(
        {**gpu_result(1.2, 85), "targets": found, "smoke": False, "native": True,
         "float32_matmul_precision": "high", "provenance": {"cpu": "c", "torch": "t", "commit": "x"}}
    )  # fmt: skip
    assert "rows skipped: 1; contenders left out: 0; failures: 1" in page
    assert "missed       every parameter kernel" in page


# ---------------------------------------------------------------- harness


@pytest.mark.parametrize(
    ("model", "flags", "slug"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", "avx2 avx512f", "intel-xeon-2.80ghz-avx512"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "avx512f avx512_bf16 amx_bf16",
         "intel-xeon-platinum-8481c-2.70ghz-amx"),
        ("AMD EPYC 7763 64-Core Processor", "avx2", "amd-epyc-7763-avx2"),
        ("AMD EPYC", "avx2 avx512f avx512_bf16", "amd-epyc-avx512bf16"),
        ("aarch64", "", "aarch64"),
    ],
)  # fmt: skip
def test_machine_slug(model: str, flags: str, slug: str) -> None:
    assert harness.machine_slug(model, flags.split()) == slug


def test_machine_slug_tells_generations_of_one_name() -> None:
    flags = ("avx512f", "avx512_bf16")
    assert harness.machine_slug("AMD EPYC", flags, "25") == "amd-epyc-avx512bf16"
    assert harness.machine_slug("AMD EPYC", flags, "26") == "amd-epyc-zen5-avx512bf16"
    assert harness.machine_slug("Intel Xeon", flags, "26") == "intel-xeon-avx512bf16"


def test_a_suffix_is_added_to_a_name_with_dots() -> None:
    assert harness.with_suffix(Path("a/b-2.80ghz"), ".json") == Path("a/b-2.80ghz.json")


def test_quick_runs_leave_the_results_alone() -> None:
    assert harness.RESULTS not in harness.out_path(None, "layers", True).parents
    assert harness.out_path(None, "layers", False).parent == harness.RESULTS


def test_contenders_run_in_turn_and_one_that_raises_drops_out() -> None:
    order: list[str] = []

    def contender(name: str, fails_at: int = 99) -> Callable[[], Callable[[], int]]:
        def run() -> int:
            order.append(name)
            if order.count(name) == fails_at:
                raise ValueError("no more")
            return order.count(name)

        return lambda: run

    def left_out() -> Callable[[], int]:
        raise harness.SkippedError("the time budget")

    made = {"a": contender("a"), "b": contender("b", 2), "c": left_out}
    times, errors = harness.contest(made, harness.Effort(rounds=3))
    assert order == ["a", "b", "a", "b", "a"]
    assert times == {"a": [1, 2, 3]}
    assert errors == {"b": {"error": "ValueError: no more"}, "c": {"error": "skipped: the time budget"}}
    with pytest.raises(RuntimeError, match="no more"):
        harness.of_all((times, errors))


def test_rounds_stop_after_their_time_but_not_before_the_least() -> None:
    times, _ = harness.contest({"a": lambda: lambda: 1}, harness.Effort(rounds=100, seconds=0.0, least=4))
    assert len(times["a"]) == 4


def test_ratio_of_quantiles() -> None:
    draw = random.Random(1)
    base = [draw.uniform(1, 2) for _ in range(31)]
    ratio = harness.ratio([3 * t for t in base], base)
    # The two times of a round stay together, so a ratio that never changes has no spread.
    assert ratio["ratio"] == pytest.approx(3)
    assert ratio["low"] == pytest.approx(3)
    assert ratio["spread"] == pytest.approx(0, abs=1e-12)
    loose = harness.ratio([draw.uniform(1, 2) for _ in base], base)
    assert loose["low"] < loose["ratio"] < loose["high"]
    assert loose["spread"] > 0.01
    once, again = ([draw.uniform(1, 2) for _ in range(1000)] for _ in range(2))
    more = harness.ratio(once, again)
    assert more["spread"] < loose["spread"]
    # What hits two thirds of the rounds does not move the lower quartile.
    hit = [t + 5 if i % 3 else t for i, t in enumerate(base)]
    assert harness.ratio(hit, base)["ratio"] > 2
    assert harness.ratio(hit, base, quantile=0.25)["ratio"] < 1.5


# ---------------------------------------------------------------- comparison


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [change.key.contender for change in compare.regressions(compare.changes(old, new))]


def test_a_fifth_slower_is_found_and_less_than_the_floor_is_not() -> None:
    assert slower(result(), result(bbb=1.5 * 1.2)) == ["bbb"]
    assert slower(result(), result(bbb=1.5 * 1.05)) == []
    assert slower(result(), result(bbb=1.5 / 1.2)) == []


def test_the_worst_comes_first() -> None:
    assert slower(result(), result(bbb=1.5 * 1.2, lrt=2.5 * 1.5)) == ["lrt", "bbb"]


def test_noise_widens_the_tolerance_and_is_reported() -> None:
    old, new = result(spread=0.05), result(bbb=1.5 * 1.2, spread=0.05)
    assert slower(old, new) == []
    assert {c.key.contender for c in compare.blind(compare.changes(old, new))} == {"bbb", "lrt"}
    assert compare.blind(compare.changes(result(), result())) == []
    assert slower(old, result(bbb=1.5 * 2, spread=0.05)) == ["bbb"]


@pytest.mark.parametrize("name", compare.SAME)
def test_another_machine_or_version_is_refused(name: str) -> None:
    new = result()
    new["provenance"][name] = "other"
    assert compare.incompatible(result(), result()) == []
    assert [reason.split(":")[0] for reason in compare.incompatible(result(), new)] == [name]


def test_other_threads_are_refused() -> None:
    assert "no number of threads in common: [1] and [2]" in compare.incompatible(result(), result(threads=2))
    both = result()
    both["runs"] += result(threads=2)["runs"]
    assert compare.incompatible(both, result(threads=2)) == []


def test_nothing_in_common_is_refused() -> None:
    other = result()
    other["runs"][0]["layers"][0]["case"] = "another"
    assert compare.incompatible(result(), other) == ["no case and contender in common"]


def compare_files(folder: Path, monkeypatch: pytest.MonkeyPatch, *results: dict[str, Any]) -> int:
    files = [folder / f"{i}.json" for i in range(len(results))]
    for file, content in zip(files, results, strict=True):
        file.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["cpu.py", "layers", "--compare", *map(str, files)])
    return cpu.main()


def test_compare_says_what_became_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_files(tmp_path, monkeypatch, result(), result()) == 0
    assert "nothing became slower" in capsys.readouterr().out
    assert compare_files(tmp_path, monkeypatch, result(), result(lrt=3.0)) == 1
    out = capsys.readouterr().out
    assert f"slower: {CASES[0].name}, lrt, 1 thread(s): 2.500 -> 3.000 times its base, +20%" in out
    assert compare_files(tmp_path, monkeypatch, result(), result(threads=2)) == 2
    assert "cannot be compared" in capsys.readouterr().out


def test_a_contender_that_fails_now_is_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = result()
    broken["runs"][0]["layers"][0]["contenders"]["lrt"] = {"error": "RuntimeError: no"}
    assert compare_files(tmp_path, monkeypatch, result(), broken) == 1
    assert "failed now, ran before" in capsys.readouterr().out
    # One that was not asked for is not missed.
    fewer = result()
    del fewer["runs"][0]["layers"][0]["contenders"]["lrt"]
    assert compare_files(tmp_path, monkeypatch, result(), fewer) == 0


def measured(seed: int, slow: str | None = None) -> dict[str, Any]:
    """A result whose times are made up: each contender's own, with three per cent of jitter."""
    draw = random.Random(seed)
    steps = {"nn": 1e-3, "bbb": 1.6e-3, "lrt": 2.4e-3}

    def wrap(name: str, run: Callable[[], layers.Times]) -> Callable[[], layers.Times]:
        def timed() -> layers.Times:
            run()
            step = steps[name] * draw.lognormvariate(0, 0.03) * (1.2 if name == slow else 1)
            return layers.Times(step / 3, 2 * step / 3, step)

        return timed

    made = result()
    made["runs"][0]["layers"] = [layers.run_case(LINEAR, ("bbb", "lrt"), EFFORT, wrap)]
    return made


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_down_goes_through_the_whole_harness(seed: int) -> None:
    old = measured(2 * seed)
    assert slower(old, measured(2 * seed + 1)) == []
    assert slower(old, measured(2 * seed + 1, slow="lrt")) == ["lrt"]
    # What everything is measured against being slower makes nothing else slower.
    assert slower(old, measured(2 * seed + 1, slow="nn")) == []


def test_suspects_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    old, suspicious = result(), result(bbb=2.0, lrt=3.5)
    asked: list[set[str]] = []

    def again(old: Any, effort: Any, select: Callable[[compare.Key], bool]) -> dict[str, Any]:
        asked.append({key.contender for key in compare.ratios(old) if select(key)})
        return second

    monkeypatch.setattr(cpu, "measure_again", again)
    second = copy.deepcopy(old)
    assert cpu.judge(old, suspicious, EFFORT, again=True) == 0
    assert asked == [{"bbb", "lrt"}]
    second = result(lrt=3.5)
    assert cpu.judge(old, suspicious, EFFORT, again=True) == 1


def test_measuring_again_takes_the_old_cases_and_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(cpu, "measure", lambda *args: taken.extend(args))
    cpu.measure_again(result(threads=2), EFFORT)
    name, counts, (job,), _ = taken
    assert (name, counts, job.section, job.case) == ("layers", [2], "layers", CASES[0].name)
    assert job.run.args == (CASES[0], ["bbb", "lrt"], EFFORT)


# ---------------------------------------------------------------- memory


def test_saved_counts_a_storage_once_and_leaves_out_what_is_kept_anyway() -> None:
    x = torch.randn(100, requires_grad=True)
    assert layers.saved_for_backward(lambda: x.exp(), [x]) == 400
    # exp keeps its result, which the product keeps too, as a view of the same storage.
    assert layers.saved_for_backward(lambda: (lambda e: e * e.view(100))(x.exp()), [x]) == 400
    layer = nn.Linear(100, 7)
    assert layers.saved_for_backward(lambda: layer(x), [x, *layer.parameters()]) == 0
    assert layers.saved_for_backward(lambda: layer(x), layer.parameters()) == 400


@pytest.mark.skipif(not _backend.native_available(), reason="the native extension is not loaded")
def test_saved_sees_what_native_functions_keep() -> None:
    mu = torch.randn(5, 6, requires_grad=True)
    rho, x = (torch.randn(5, 6) - 3).requires_grad_(), torch.randn(4, 6, requires_grad=True)
    rng = functional.draw_rng()
    saved = layers.saved_for_backward(
        lambda: functional.lrt_linear(x, mu, rho, None, None, rng), [x, mu, rho]
    )
    assert saved == 4 * 5 * 4 + 16  # and the rng: two 64-bit numbers


def test_peak_is_of_the_steps_own_tensors() -> None:
    older = [torch.zeros(50_000)]

    def step() -> torch.Tensor:
        older.clear()
        first = torch.zeros(10_000)
        del first
        second, third = torch.zeros(20_000), torch.zeros(5_000)
        del third
        return second

    assert layers.peak_bytes(step) == 100_000


# ---------------------------------------------------------------- contenders


LIBRARIES = {
    "bayesian_torch": "bayesian_torch",
    "bayesian_torch_flipout": "bayesian_torch",
    "blitz": "blitz",
    "torchbnn": "torchbnn",
}


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("compiled") else [])
        for name in rivals.CONTENDERS
    ],
)
def test_every_contender_takes_a_whole_step(name: str, case: Case) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    plain = case.layer("nn")
    x = case.input().requires_grad_()
    g = torch.randn_like(plain(x))
    stepper = layers.Stepper(rivals.CONTENDERS[name].build(case), x, g, repeat=2)
    y, kl = stepper.forward()
    assert y.shape == g.shape
    assert (kl is None) == (name == "nn" or name.endswith("_output"))
    stepper.step()
    # By storage: blitz registers each parameter twice, and one of the two gets the gradient.
    trained = {p.data_ptr(): p for p in stepper.leaves if p.grad is not None}
    assert set(trained) == {p.data_ptr() for p in stepper.leaves}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    # Every library has a mean and a spread for each of the plain layer's weights.
    count = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in trained.values()) == x.numel() + (count if name == "nn" else 2 * count)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_set_their_flag(name: str) -> None:
    estimator, flag, value = VARIANTS[name]
    assert getattr(LINEAR.layer(name), flag) == value
    assert getattr(LINEAR.layer(estimator), flag, None) != value
    for case in model_cases(2, channels=1):
        marked = [m for m in case.model(name).modules() if hasattr(m, "W_mu")]
        assert marked
        assert all(getattr(m, flag) == value for m in marked)


def test_a_missing_library_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchbnn", None)
    rows = layers.run_case(LINEAR, ("bbb", "torchbnn"), layers.QUICK)["contenders"]
    assert "torchbnn" in rows["torchbnn"]["error"]
    assert "over_base" in rows["bbb"]


def test_the_libraries_are_pinned_where_they_are_installed_from() -> None:
    pinned = re.findall(r"^([a-z-]+)==[\d.]+$", (BENCHMARKS / "rivals.txt").read_text(), flags=re.M)
    assert sorted(pinned) == sorted(rivals.versions())


# ---------------------------------------------------------------- reports


def test_verdict() -> None:
    assert tables.verdict(1.5, 1.8) == "1.50 (≤ 1.8: met)"
    assert tables.verdict(1.9, 1.8) == "1.90 (≤ 1.8: **missed**)"
    assert tables.verdict(None, 1.8) is None
    assert tables.verdict(1.5, None) == 1.5


def test_numbers_are_found_by_their_path() -> None:
    number = tables.Number("ms", "step.median_us", 1e3)
    assert number.of({"step": {"median_us": 1500}}) == 1.5
    assert number.of({"step": {}}) is number.of({"error": "no"}) is number.of(None) is None


def test_layers_page_judges_the_targets() -> None:
    made = result(bbb=1.5, lrt=2.9)
    rows = made["runs"][0]["layers"][0]["contenders"]
    rows["torchbnn"] = {"error": "ModuleNotFoundError: No module named 'torchbnn'"}
    jobs = [harness.Job("layers", CASES[0].name, dict)]
    text = cpu.page("layers", made, jobs)
    assert f"| {CASES[0].name} | 1.50 (≤ 1.8: met) | 2.90 (≤ 2.6: **missed**) | - |" in text
    assert f"| {CASES[0].name} | torchbnn | - | - | - | - | - | - | - | - | ModuleNotFoundError" in text
    assert f"| {CASES[0].name} | BBB | 1.5 | 1.5 | 1.5 | 1.50 | 1.47 | 1.53 | 0.0 | 1.0 |  |" in text


def test_figures_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    made = result()
    made["runs"].append(result(threads=2)["runs"][0])
    assert figures.layers(made).startswith(b"\x89PNG")


# ---------------------------------------------------------------- the other benchmarks


def test_models_start_from_one_state() -> None:
    case = model_cases(2, channels=1)[0]
    alike = case.alike(models.CONTENDERS)
    x = case.input()
    expected = alike["nn"](x)
    for name in ("bbb", "lrt"):
        assert all((rho == -5).all() for key, rho in alike[name].state_dict().items() if key.endswith("_rho"))
        with posterior_means():
            torch.testing.assert_close(alike[name](x)[0], expected)
    for name in ("eager_bbb", "eager_lrt"):
        assert alike[name].state_dict().keys() == alike["bbb"].state_dict().keys()
        for key, value in alike["bbb"].state_dict().items():
            torch.testing.assert_close(alike[name].state_dict()[key], value)


def test_models_go_through_every_minibatch() -> None:
    case = model_cases(2, channels=1)[0]
    table = models.run_model(case, images=10)
    assert set(table["contenders"]) == set(models.CONTENDERS)
    for name, row in table["contenders"].items():
        assert row["step"]["runs"] == 5
        assert row["last_loss"] == row["last_loss"]  # not NaN
        assert ("eager_over_ours" in row) == (name in models.EAGER)


def test_prediction_agrees_with_the_loop_of_weight_draws() -> None:
    torch.manual_seed(1)
    table = models.run_predict(model_cases(4, channels=1)[0], images=8, samples=30)
    assert table["agrees"]


def test_agreement_notices_another_mean() -> None:
    x = [torch.zeros(50, 3)]

    def predictor(shift: float) -> models.Predictor:
        made = models.Predictor(lambda x: torch.randn(100, *x.shape) + torch.tensor([shift, 0, 0]), x)
        made.next_batch()
        return made

    torch.manual_seed(0)
    ours = predictor(0.0)
    assert models.agreement(ours, predictor(0.0))["rms_standardised"] < models.AGREEMENT
    assert models.agreement(ours, predictor(1.0))["rms_standardised"] > models.AGREEMENT


def test_rates_come_from_known_work() -> None:
    case = scaling.linear(100, 10)

    def row(us: float) -> dict[str, Any]:
        return {"step": {"median_us": us}}

    table = scaling.with_rates(
        case, {"contenders": {"nn": row(60), "bbb": row(80), "lrt": row(200), "eager_lrt": row(120)}}
    )
    rows = table["contenders"]
    assert rows["nn"]["gflops"] == pytest.approx(3 * 2 * 10 * 100 * 100 / 60e-6 / 1e9)
    assert rows["nn"]["of_plain_rate"] == 1
    assert rows["bbb"]["of_plain_rate"] == pytest.approx(60 / 80)
    assert rows["lrt"]["of_plain_rate"] == pytest.approx(120 / 200)
    assert rows["bbb"]["gb_per_s_beside_products"] == pytest.approx(32 * 100 * 100 / 20e-6 / 1e9)
    assert rows["lrt"]["us_beside_products"] == pytest.approx(80)
    # Nothing beyond the products: no rate.
    assert rows["eager_lrt"]["gb_per_s_beside_products"] is None


@pytest.mark.parametrize("document", readme.documents(), ids=lambda path: path.name)
def test_documents_have_the_numbers_of_the_results(document: Path) -> None:
    """Nobody typed them: the files in benchmarks/results say the same."""
    assert document.read_text() == readme.filled(document)


def test_documents_have_markers_that_are_understood() -> None:
    """A marker with a typing error would be a table that nobody fills."""
    for document in readme.documents():
        text = document.read_text()
        understood = len(readme.MARKED.findall(text)) + len(readme.TABLE.findall(text))
        assert text.count("by benchmarks/readme.py -->") == understood, document.name
    assert readme.TABLE.search((readme.ROOT / "README.md").read_text())


def test_readme_takes_columns_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [{"name": n, "format": f, "better": None} for n, f in (("set", ""), ("a", ".1f"), ("b", ".2f"))]
    table = {"title": "t", "columns": columns, "rows": [["x", 1.25, None], ["y", 2, "3 ± 1"]], "note": ""}
    (tmp_path / "some-run.json").write_text(json.dumps({"tables": [{}, table]}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    document = tmp_path / "doc.md"
    document.write_text(
        "before\n<!-- table 2 of some-run.json, columns 1 3, by benchmarks/readme.py -->\nold\n"
        "<!-- end of the table -->\nbetween\n<!-- table 2 of some-run.json, by benchmarks/readme.py -->\n"
        "<!-- end of the table -->\n"
    )
    assert readme.filled(document) == (
        "before\n<!-- table 2 of some-run.json, columns 1 3, by benchmarks/readme.py -->\n"
        "| set | b |\n|---|---|\n| x | - |\n| y | 3 ± 1 |\n<!-- end of the table -->\nbetween\n"
        "<!-- table 2 of some-run.json, by benchmarks/readme.py -->\n"
        "| set | a | b |\n|---|---|---|\n| x | 1.2 | - |\n| y | 2.0 | 3 ± 1 |\n<!-- end of the table -->\n"
    )


def test_readme_shows_the_worse_of_two_machines() -> None:
    """The larger of our ratios, the smaller of a rival's."""
    runs = [result(bbb=1.2, lrt=2.9)["runs"][0], result(bbb=1.5, lrt=2.1)["runs"][0]]
    for run, ratio in zip(runs, (4.0, 3.0), strict=True):
        rows = run["layers"][0]["contenders"]
        rows["eager_bbb"] = copy.deepcopy(rows["bbb"])
        rows["eager_bbb"]["over_base"]["ratio"] = ratio
    row = readme.layers_table(runs).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")][2:5] == ["1.50", "2.90", "3.00"]
