from __future__ import annotations

from fundusfm.recipe.problems import Problem, nearest, refusal


def test_nearest() -> None:
    keys = ["optim.lr", "trainer.max_steps", "data.workers"]
    assert nearest("max_step", ["max_steps", "max_exams"]) == " (did you mean max_steps?)"
    assert nearest("lr", ["max_steps"], keys) == " (did you mean optim.lr?)"
    assert nearest("worker", ["x"], keys) == " (did you mean data.workers?)"
    assert nearest("nothing", ["x"], keys) == ""


def test_refusal__each_problem_once() -> None:
    problem = Problem("a.b", "is wrong", "f.yaml:3")
    error = refusal([problem, problem, Problem("c", "too")], "f.yaml")
    assert error.what == "the recipe has 2 problems:\n  - f.yaml:3: a.b: is wrong\n  - c: too"
