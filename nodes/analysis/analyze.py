"""See what a threshold would select before training."""

from comfy_api.latest import io

from ...sara_core.weights.analysis import Analysis, Tally, analyze
from ...sara_core.weights.parameters import filter_parameters
from .. import host, page_state
from ..inputs import advanced, filter_inputs, fraction_input, searched_as, threshold_input
from . import plots
from .chart import analysis_chart

KIND = "sara_analysis"


def report(analysis: Analysis) -> str:
    """Tell the analysis as text: totals, suggested thresholds, tables by kind and block."""
    cutoff, total = analysis.cutoff, analysis.total
    lines = [
        f"threshold {cutoff.threshold:.6g} selects {total.num_selected:,} of "
        f"{total.num_weights:,} weights ({_share(total.num_selected, total.num_weights)})",
        f"exactly zero: {total.num_zeros:,} ({_share(total.num_zeros, total.num_weights)}), "
        + ("skipped: padding or dead inputs" if cutoff.skip_zeros else "selected like any other"),
        "",
        "suggested thresholds",
        *(f"  {label:>4}: {value:.3g}" for label, value in analysis.suggestions.items()),
    ]
    for title, groups in (("kind", analysis.kinds), ("block", analysis.blocks)):
        width = max(map(len, groups))
        lines += ["", f"{title:<{width}}  {'weights':>13}  {'selected':>12}   share    zero"]
        lines += [_row(name.ljust(width), tally) for name, tally in groups.items()]
    return "\n".join(lines)


def _row(name: str, tally: Tally) -> str:
    return (
        f"{name}  {tally.num_weights:>13,}  {tally.num_selected:>12,}  "
        f"{_share(tally.num_selected, tally.num_weights):>6}  "
        f"{_share(tally.num_zeros, tally.num_weights):>6}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def selection_rule(threshold: float, fraction: float, count: str) -> dict:
    """Turn the widgets into the core's rule: threshold before count before fraction."""
    if threshold > 0:
        return {"threshold": threshold}
    return {"num_trainable": count} if count.strip() else {"fraction": fraction}


class SaraAnalyze(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraAnalyze",
            display_name="SaRA Analyze",
            category="SaRA",
            description="Shows how large a model's weights are and what a threshold would train. "
            "The output zeroed is the model with exactly those weights at zero: sample with it "
            "to see how little they do.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **searched_as("magnitude histogram", "weight threshold", "inspect model"),
            inputs=[
                io.Model.Input("model", tooltip="Model to look at. It is not changed."),
                threshold_input(),
                fraction_input(),
                *advanced(
                    [
                        io.String.Input(
                            "count",
                            default="",
                            tooltip="Number of weights to select, such as 5M or 50M. Used instead of "
                            "the fraction while the threshold is 0.",
                        ),
                        *filter_inputs(),
                    ]
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, unchanged."),
                io.Float.Output(
                    display_name="threshold",
                    tooltip="Connected to SaRA Train, it trains these weights. By itself SaRA Train takes the same "
                    "share of each layer.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Counts by block and kind of layer."
                ),
                io.Image.Output(
                    display_name="histogram", tooltip="log10 of the weights' magnitude."
                ),
                io.Model.Output(
                    display_name="zeroed", tooltip="The model with the selected weights at zero."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, threshold, fraction, count, include, exclude, zeros) -> io.NodeOutput:
        weights = host.trainable_weights(model)
        weights = weights.only(filter_parameters(weights.kinds, include, exclude))
        rule = selection_rule(threshold, fraction, count)
        analysis = analyze(weights, **rule, zeros=host.zero_rule(model, zeros))
        value = analysis.cutoff.threshold
        zeroed = host.zero_small_weights(model, list(weights), value)
        text, picture = report(analysis), plots.histogram(analysis)
        chart = {
            **analysis_chart(analysis, host.bytes_per_trained_weight(model)),
            "node": cls.hidden.unique_id,
            "workflow": host.workflow_id(cls.hidden.extra_pnginfo),
        }
        page_state.keep(KIND, chart)
        ui = {"text": (text,), KIND: (chart,)}
        return io.NodeOutput(model, value, text, picture, zeroed, ui=ui)
