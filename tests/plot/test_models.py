"""Pictures of whole models: asserted on what is drawn where, not on pixels."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

import zeropoint as zp
from tests.models import VOCABULARY, build
from zeropoint.errors import PlotError
from zeropoint.evaluate.compare import EncoderComparison, LanguageComparison
from zeropoint.evaluate.statistics import Interval
from zeropoint.flows.activations import CalibratedLayer, CalibrationTable
from zeropoint.flows.report import FreezeReport, LayerReport

KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [
    f"mlp.{k}_proj" for k in ("gate", "up", "down")
]
NAMES = [f"model.layers.{i}.{kind}" for i in range(30) for kind in KINDS] + ["lm_head"]


def row_labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def overlapping(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


# --- layers ---


@pytest.fixture
def freeze_report():
    errors = {name: (i * 7 % len(NAMES)) / 1000 for i, name in enumerate(NAMES)}
    layers = [LayerReport(name=n, algorithm="gptq", output_error=e) for n, e in errors.items()]
    return FreezeReport(algorithm="gptq", layers=tuple(layers))


def test_layers_are_drawn_worst_first_and_the_others_are_counted(freeze_report):
    figure = zp.plot.layers(freeze_report)
    ax = figure.axes[0]
    worst = freeze_report.worst
    assert row_labels(ax) == [layer.name for layer in worst[:25]]
    assert [bar.get_width() for bar in ax.patches] == [
        100 * layer.output_error for layer in worst[:25]
    ]
    assert ax.yaxis.get_inverted(), "the first is on top"
    assert ax.get_xlabel() == "% of the squared output; 186 more layers have at most 18"
    figure.draw_without_rendering()
    assert not overlapping([label.get_window_extent() for label in ax.get_yticklabels()])


def test_layers_that_are_all_drawn_leave_none_out(freeze_report):
    ax = zp.plot.layers(freeze_report, first=500).axes[0]
    assert len(ax.patches) == len(NAMES) and ax.get_xlabel() == "% of the squared output"


def test_the_report_of_quantize_has_bytes():
    report = zp.quantize(build("llama-tied"), "int8")
    ax = zp.plot.layers(report, first=3).axes[0]
    largest = sorted(report.modules, key=lambda m: -m.bytes_before)[:3]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [m.bytes_before / 1e6 for m in largest] + [
        m.bytes_after / 1e6 for m in largest
    ]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]


def test_layers_without_errors_are_refused(freeze_report):
    model = build("llama")
    report = zp.quantize(model, "int8")
    frozen = zp.freeze(model)
    with pytest.raises(
        PlotError, match=r"'rtn' knows no output errors, .* zp.freeze\(model, 'gptq'"
    ):
        zp.plot.layers(frozen)
    with pytest.raises(PlotError, match="first=0 draws no layer; use 1 or more"):
        zp.plot.layers(freeze_report, first=0)
    with pytest.raises(PlotError, match="the report has no modules"):
        zp.plot.layers(replace(report, modules=()))


# --- activations ---


def table(observer, ranges):
    return CalibrationTable(
        rows=tuple(
            CalibratedLayer(
                module=name,
                observer=observer,
                samples=1,
                low=low,
                high=high,
                scale=1.0,
                zero_point=0,
            )
            for name, (low, high) in ranges.items()
        )
    )


def segments(collection):
    return [tuple(path.vertices[:, 1]) for path in collection.get_paths()]


def test_ranges_have_a_picture_for_each_kind_of_layer():
    chosen = {name: (-float(i), 2.0 * i) for i, name in enumerate(NAMES)}
    seen = {name: (3 * low, 3 * high) for name, (low, high) in chosen.items()}
    figure = zp.plot.activations(table("mse", chosen), seen=table("minmax", seen))
    assert [ax.get_title(loc="left") for ax in figure.axes] == [*KINDS, "lm_head"]
    down = figure.axes[KINDS.index("mlp.down_proj")]
    behind, front = down.collections
    names = [name for name in NAMES if name.endswith("down_proj")]
    assert segments(front) == [chosen[name] for name in names]
    assert segments(behind) == [seen[name] for name in names]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["minmax", "mse"]


def test_kinds_that_end_alike_keep_their_names():
    figure = zp.plot.activations(
        table("mse", {f"{s}.0.q": (-1, 1) for s in ("encoder", "decoder")})
    )
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["encoder.*.q", "decoder.*.q"]


def test_ranges_of_a_calibrated_model():
    model = build("llama")
    zp.quantize(model, "int8", activations="int8")
    with zp.calibrate(model, "minmax"), torch.no_grad():
        model(torch.arange(VOCABULARY)[None, :32])
    rows = zp.calibration_table(model).rows
    drawn = [
        s
        for ax in zp.plot.activations(zp.calibration_table(model)).axes
        for s in segments(ax.collections[0])
    ]
    assert sorted(drawn) == sorted((row.low, row.high) for row in rows)


def test_tables_of_different_models_are_refused():
    with pytest.raises(PlotError, match="the table has 2 layers, seen= has 1, .* of one model"):
        zp.plot.activations(
            table("mse", {"a": (0, 1), "b": (0, 1)}), seen=table("mse", {"a": (0, 1)})
        )


# --- what a size costs ---


def language(bits, kl, text="a text"):
    return LanguageComparison(
        tokens=511,
        text=text,
        reference_perplexity=10.0,
        reference_bytes=1,
        candidate_perplexity=10.0,
        candidate_bytes=1,
        candidate_bits_per_weight=bits,
        delta_nll=Interval(0.0, 0.0, 0.0),
        kl_mean=kl,
        kl_median=kl,
        kl_p99=kl,
        kl_max=kl,
        top1_agreement=1.0,
    )


def encoder(bits, cosine):
    return EncoderComparison(
        sentences=9,
        text="a text",
        reference_bytes=1,
        candidate_bytes=1,
        candidate_bits_per_weight=bits,
        cosine_mean=cosine,
        cosine_p01=cosine,
        rank_agreement=1.0,
    )


def points(ax):
    return [tuple(point) for point in ax.collections[0].get_offsets()]


def labels(ax):
    return [text for text in ax.texts if text.get_text()]


def test_each_comparison_is_a_point_with_its_label():
    ax = zp.plot.tradeoff({"int8": language(8.05, 0.005), "int4": language(5.4, 0.25)}).axes[0]
    assert points(ax) == [(8.05, 0.005), (5.4, 0.25)]
    assert [(t.get_text(), t.xy) for t in labels(ax)] == [
        ("int8", (8.05, 0.005)),
        ("int4", (5.4, 0.25)),
    ]
    assert ax.get_yscale() == "log" and "nats per token" in ax.get_ylabel()


def test_the_line_joins_what_nothing_smaller_beats():
    costs = {"int8": (8, 0.005), "e5m2": (8, 0.02), "int4": (5, 0.2), "int6": (6.5, 0.3)}
    ax = zp.plot.tradeoff({name: language(*cost) for name, cost in costs.items()}).axes[0]
    assert [tuple(p) for p in ax.lines[0].get_xydata()] == [costs["int4"], costs["int8"]]


def test_a_distance_of_zero_stands_at_the_foot_and_says_so():
    ax = zp.plot.tradeoff({"bfloat16": language(16, 0.0), "int8": language(8, 0.01)}).axes[0]
    assert points(ax) == [(16, 0.001), (8, 0.01)]
    assert labels(ax)[0].get_text() == "bfloat16 (0)"


def test_encoders_have_the_distance_of_their_embeddings():
    ax = zp.plot.tradeoff({"int8": encoder(8.0, 0.75)}).axes[0]
    assert points(ax) == [(8.0, 0.25)] and ax.get_ylabel() == "1 - mean cosine"


@pytest.mark.parametrize("seed", range(3))
def test_labels_touch_neither_each_other_nor_points(seed):
    rng = random.Random(seed)
    costs = {name: (8 + rng.random(), math.exp(rng.random())) for name in zp.formats.FORMATS}
    figure = zp.plot.tradeoff({name: language(*cost) for name, cost in costs.items()})
    figure.draw_without_rendering()
    ax = figure.axes[0]
    boxes = [text.get_window_extent() for text in labels(ax)]
    assert len(boxes) == len(costs) and not overlapping(boxes)
    for point in points(ax):
        assert not any(box.contains(*ax.transData.transform(point)) for box in boxes)


def test_comparisons_that_do_not_compare_are_refused():
    with pytest.raises(PlotError, match=r"comparisons=\{\} has nothing to draw"):
        zp.plot.tradeoff({})
    with pytest.raises(PlotError, match="are of 2 different texts, lengths or kinds of model"):
        zp.plot.tradeoff({"a": language(8, 0.1), "b": language(4, 0.2, "another")})
    with pytest.raises(PlotError, match="are of 2 different"):
        zp.plot.tradeoff({"a": language(8, 0.1), "b": encoder(4, 0.2)})


# --- losses ---


def test_losses_are_drawn_at_their_steps():
    figure = zp.plot.losses([(0, 3.0), (1, 2.5), (2, 2.0)], held_out=[(0, 3.1), (2, 2.2)])
    train, held_out = figure.axes[0].lines
    assert train.get_xydata().tolist() == [[0, 3.0], [1, 2.5], [2, 2.0]]
    assert held_out.get_xydata().tolist() == [[0, 3.1], [2, 2.2]]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["training", "held out"]
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"
    relative = zp.plot.losses([(0, 3.0)], unit="relative squared error")
    assert relative.axes[0].get_ylabel() == "loss (relative squared error)"


def test_a_loss_that_is_not_finite_is_a_gap_that_is_counted():
    figure = zp.plot.losses([(0, 3.0), (1, math.inf), (2, math.nan)])
    (line,) = figure.axes[0].lines
    assert line.get_label() == "training (2 not finite)"
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, True]


def test_a_single_loss_is_visible():
    figure = zp.plot.losses([(7, 3.0)])
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_no_losses_are_refused():
    with pytest.raises(PlotError, match=r"train=\[\] has no losses; pass \(step, loss\) pairs"):
        zp.plot.losses([])
