"""The report of a run: what is in it, that it needs nothing else, and that it can be drawn anew."""

import base64
import re

import pytest

from tests.small_run import TINY_MODEL
from train import pretrain, report
from train.report import FIGURES, Run, edges, main, read_run, render, shares, thinned

SPARSE = {"q_lora_rank": 16, "index_topk": 4, "index_n_heads": 3, "index_head_dim": 8, "num_nextn_predict_layers": 1}


def pictures(page: str) -> dict[str, str]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', page)
    return {name: base64.b64decode(data).decode() for name, data in found}


@pytest.mark.report
def test_a_run_ends_with_a_report(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        model={"config": "small", "overrides": TINY_MODEL | SPARSE},
        trainer={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "report_to": []},
    )
    metrics = pretrain.run(recipe)
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    drawn = pictures(page)
    assert set(drawn) == {figure.__name__.replace("_", " ") for figure in FIGURES}
    assert all(svg.lstrip().startswith("<?xml") and svg.rstrip().endswith("</svg>") for svg in drawn.values())
    assert "layer 1" in drawn["loads over time"] and "module 1" in drawn["multi token"]
    assert "bits per byte" in drawn["losses"] and "grad" not in drawn["speed"]
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert "http" not in outside and "src=" not in outside and "<script" not in outside
    for words in ("Intel" if "Intel" in page else "device", "tokens seen", "<code>corpus</code>", "TFLOP/s"):
        assert words in outside
    assert f"<td>{metrics['eval_bits_per_byte']:.4f}</td>" in outside and str(tmp_path) not in page
    (run / "report.html").unlink()
    main([str(run)])
    assert (run / "report.html").read_text() == page


def test_what_was_not_logged_has_no_section(tmp_path):
    history = [{"step": step, "ce_loss": 5.0 - step, "loss": 1.0, "learning_rate": 0.1} for step in (1, 2)]
    page = render(Run("<b>title</b>", history))
    assert set(pictures(page)) == {"losses", "rates"} and "<table>" not in page
    assert "&lt;b&gt;title" in page and "<b>" not in page
    with pytest.raises(SystemExit, match="no folder of a run: it has neither trainer_state.json nor a checkpoint"):
        main([str(tmp_path)])


def test_a_run_that_was_cut_off(tmp_path):
    """The last checkpoint's state is drawn, and the experts' load up to it."""
    (tmp_path / "checkpoint-10").mkdir()
    state = '{"global_step": 10, "log_history": [{"step": 10, "ce_loss": 2.0}]}'
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state)
    line = '{"step": %d, "layers": [1, 2], "tokens": [[3, 1], [0, 0]], "bias": [[0, 0], [0, 0]]}\n'
    (tmp_path / "expert_load.jsonl").write_text(line % 10 + line % 20)
    assert [entry["step"] for entry in read_run(tmp_path).load] == [10]
    main([str(tmp_path)])
    assert set(pictures((tmp_path / "report.html").read_text())) == {"losses", "loads over time", "at the end"}


@pytest.mark.parametrize(
    "state, words",
    [
        ('{"global_step": 3}', "it has no log_history"),
        ("{}", "it has no global_step, log_history"),
        ("[]", "it has no fields"),
        ('{"global_', "Unterminated string"),
    ],
)
def test_a_state_that_is_damaged(state, words, tmp_path):
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(SystemExit, match=f"error: '{tmp_path}/trainer_state.json' is damaged: {words}") as caught:
        main([str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_heat_maps_by_numbers():
    assert shares([[3, 1], [0, 0]]).tolist() == [[1.5, 0.5], [0, 0]]
    assert edges([1, 3, 7]).tolist() == [0, 2, 5, 9] and edges([4]).tolist() == [3.5, 4.5]
    assert thinned(list(range(10)), 4) == [0, 3, 6, 9] and thinned([1, 2], 4) == [1, 2]


def test_many_layers_and_a_single_step():
    layers = list(range(3, 61))
    load = [{"step": 5, "layers": layers, "tokens": [[1, 2, 3]] * 58, "bias": [[0.0, 0.1, 0.2]] * 58}]
    history = [{"step": 5, "expert_max_violation": 0.5} | {f"expert_max_violation/layer_{i}": 0.5 for i in layers}]
    run = Run("many", history, load)
    titles = [axis.get_title() for axis in report.loads_over_time(run).axes]
    assert titles[0] == "layer 3" and titles[11] == "layer 60" and len(titles) == 13  # and the colour bar
    assert len(report.violations(run).axes) == 2
    report.plt.close("all")


def test_an_odd_number_of_layers():
    load = [{"step": 5, "layers": [1, 2, 3], "tokens": [[1, 2, 3]] * 3, "bias": [[0.0, 0.1, 0.2]] * 3}]
    assert len(report.loads_over_time(Run("odd", [], load)).axes) == 4  # three maps and the colour bar
    report.plt.close("all")
