"""The scores as a table on the terminal, as report.json and as report.html, one page with every picture in it."""

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import plots
from files import whole
from metrics import verdict
from metrics.distances import wilson_interval
from metrics.measure import Sample
from metrics.score import DISTANCES, apart, number, ratio, subsets_of, titles_of
from metrics.usefulness import TITLES
from models.generated_folder import sha256
from simulate.recipes import recipe_behind, scale_of

# Titles of the floors that do not compare real images with other real images
FLOORS = {"class_accuracy": "  classifier accuracy, real", **dict.fromkeys(TITLES, "  floor: real ones in their place")}
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "lenstronomy")
TOLD = ("emulation", "recovery", "conditionals", "order")  # those results of ``obedience`` that are numbers
Obedience = dict[str, Any]
_SHOWN = 8  # images of a class in the grids


def print_table(sample: Sample, count: int) -> None:
    """Prints each metric with its floor and, for Fréchet distances, the ratio of the two; then the verdict."""
    subsets = subsets_of(sample.dataset)
    rows = [(f"{count} images a class", subsets)]
    for name, title in titles_of(sample.real).items():
        metrics = [sample.metrics[name][subset] for subset in subsets]
        if metrics[0]["value"] is None:
            continue
        space = f" ({title.split(', ')[1]})" if name in DISTANCES else ""
        rows.append((title, [number(name, metric["value"]) for metric in metrics]))
        if "interval" in metrics[0]:
            rows.append(("  95% interval", [_interval(metric) for metric in metrics]))
        floor = FLOORS.get(name, f"  floor: real against real{space}")
        rows.append((floor, [with_deviation(name, metric, "floor") for metric in metrics]))
        if name in DISTANCES:
            ratios = [number(name, ratio(metric["value"], metric["floor"])) for metric in metrics]
            rows.append((f"  ratio to the floor{space}", ratios))
    first, width = max(len(title) for title, _ in rows), max(20, 2 + max(map(len, subsets)))
    print(f"\n{sample.name}")
    for title, cells in rows:
        print(f"{title:{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    print("", *verdict.sentences(sample), "", sep="\n")


def print_obedience(told: dict[str, Obedience]) -> None:
    """Prints the results of ``obedience`` as tables."""
    for name, found in told.items():
        print(f"\n{name}, asked for the parameters of test images")
        for rows in _obedience_tables(found).values():
            widths = [2 + max(map(len, cells)) for cells in zip(*rows, strict=True)]
            for first, *others in rows:
                cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
                print(f"{first:{widths[0]}}{''.join(cells)}")
            print()


def write_lenses(path: str, sample: Sample) -> None:
    """A row of real and a row of generated lenses for each class, with the class's scores beside them."""
    rows, real = {}, sample.reference.sample
    for label, name in enumerate(sample.dataset.classes):
        rows[f"{name}\nreal"] = _some(real, label).numpy()
        distance = sample.metrics["frechet_lens"][name]
        accuracy = sample.metrics["class_accuracy"][name]["value"]
        scores = f"Fréchet {ratio(distance['value'], distance['floor']):.1f} x floor"
        scores += f"\nclassifier {accuracy:.0%}" if accuracy is not None else ""
        rows[f"{name}\ngenerated\n{scores}"] = _some(sample, label).numpy()
    plots.save(plots.image_grid(rows), path)


def write_json(path: Path, settings: dict[str, Any], samples: list[Sample], told: dict[str, Obedience]) -> None:
    """report.json: the metrics of the first sample, those of the others under "compared", how they were made, and the
    results of ``obedience``, by generator."""
    reference, everyone = samples[0].reference, _everyone(samples)
    content = {
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "counts": {
            "per_class": reference.count,
            "real_per_class": 2 * reference.count,
            "training_images": len(reference.train),
        },
        "classifier_sha256": sha256(settings["CLASSIFIER_PATH"]),
        "source": samples[0].source,
        "verdict": verdict.words(samples[0]),
        "metrics": samples[0].metrics,
        "lens_fit": {sample.name: _lens_fit(sample) for sample in everyone if "explained" in sample.measured},
        "confusion": {sample.name: _confusion(sample).tolist() for sample in everyone if _is_classified(sample)},
        "parameters": {name: {of: found[of] for of in TOLD if of in found} for name, found in told.items()},
        "compared": [{"name": s.name, "source": s.source, "metrics": s.metrics} for s in samples[1:]],
    }
    with whole(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def _lens_fit(sample: Sample) -> dict[str, dict[str, float]]:
    """Share of images of each class that no smooth lens explains, and the residual of the best one."""
    found = {}
    for label, name in enumerate(sample.dataset.classes):
        here = sample.measured["label"] == label
        residual, unexplained = sample.measured["lens_residual"][here], ~sample.measured["explained"][here]
        found[name] = {"unexplained_share": unexplained.double().mean().item()}
        found[name] |= {"residual_mean": residual.mean().item(), "residual_median": residual.median().item()}
    return found


def write_html(path: Path, settings: dict[str, Any], samples: list[Sample], told: dict[str, Obedience]) -> None:
    """report.html: self-contained, with the verdict first, then the pictures; the other metrics fold open."""
    everyone, splits = _everyone(samples), settings["NUM_SPLITS"]
    classes, unit = samples[0].dataset.classes, scale_of(samples[0].real)[1]
    named = [(label, name, sample) for label, name in enumerate(classes) for sample in everyone]
    grid = {f"{name}\n{sample.name}": _some(sample, label).numpy() for label, name, sample in named}
    sections = [
        *(_verdict(sample) for sample in samples),
        _folded("All metrics", _scores(samples, splits)),
        _section("Images", "The first images of each class.", plots.image_grid(grid)),
        _section(
            "Radial profile and power spectrum",
            "Median and, shaded for real and dashed for generated images, the 5% to 95% range.",
            _bands_figure(everyone, "profile", f"distance from the centre ({unit})", "brightness over peak"),
            _bands_figure(everyone, "spectrum", "wave number (cycles an image)", "power"),
        ),
    ]
    if smooth := [sample for sample in everyone if "lens_residual" in sample.measured]:
        sections.append(_lens_equation(smooth))
    if _is_classified(everyone[0]):
        sections.append(
            _section(
                "Classifier",
                "; ".join(_accuracy(sample) for sample in everyone) + " (95% Wilson intervals).",
                *(plots.confusion_matrix(_confusion(sample), classes, sample.name) for sample in everyone),
            )
        )
    for sample in samples:
        closest = sample.measured["train_distance"].argsort()[:_SHOWN]
        distances = ", ".join(f"{d:.4f}" for d in sample.measured["train_distance"][closest].tolist())
        nearest = sample.reference.train.read(sample.measured["train_neighbour"][closest])
        rows = {sample.name: sample.read(closest).numpy(), "nearest\ntraining image": nearest.numpy()}
        sections.append(
            _section(
                f"Nearest training images: {sample.name}",
                "The eight images closest to a training image, above the training image; distances of their thumbnails "
                f"as RMS over peak: {distances}.",
                plots.image_grid(rows),
            )
        )
    sections += [_obedience(name, found) for name, found in told.items()]
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    sections.append(_folded("Settings", f"<table>{rows}</table>"))
    with whole(path) as file:
        file.write(_PAGE.format(body="\n".join(sections)).encode("utf-8", "replace"))


def _everyone(samples: list[Sample]) -> list[Sample]:
    """All samples to show: each set of real images once, and behind it the samples that were scored against it."""
    found = []
    for sample in samples:
        found += [s for s in (sample.reference.sample, sample) if s not in found]
    return found


def _verdict(sample: Sample) -> str:
    """The verdict of a sample: its sentences, and the metrics that decide, with a word for each subset."""
    titles, subsets = titles_of(sample.real), subsets_of(sample.dataset)
    rows = ""
    for name, of_subsets in verdict.words(sample).items():
        cells = ""
        for subset in subsets:
            metric, word = sample.metrics[name][subset], of_subsets[subset]
            values = f"{number(name, metric['value'])}, floor {number(name, metric['floor'])}"
            cells += f'<td class="{word.split()[-1]}"><b>{word}</b><br>{values}</td>'
        rows += f"<tr><th>{titles[name]}</th>{cells}</tr>"
    said = " ".join(verdict.sentences(sample))
    return (
        f"<h2>Verdict: {html.escape(sample.name)}</h2><p>{html.escape(said)}</p>"
        f"<table><tr><th></th>{_heads(subsets)}</tr>{rows}</table><p><small>{verdict.RULE}</small></p>"
    )


def _scores(samples: list[Sample], splits: int) -> str:
    """The table of metrics: a row of values, a column for each subset and sample, and a row of floors below it."""
    subsets, columns = subsets_of(samples[0].dataset), len(samples)
    head = f"<tr><th></th>{_heads(subsets, columns)}</tr>"
    if columns > 1:
        head += f"<tr><th></th>{_heads([sample.name for sample in samples]) * len(subsets)}</tr>"
    rows = []
    for name, title in titles_of(samples[0].real).items():
        if all(sample.metrics[name]["overall"]["value"] is None for sample in samples):
            continue
        values, floors = "", ""
        for subset in subsets:
            for metric in (sample.metrics[name][subset] for sample in samples):
                marked = "apart" if apart(metric, splits) else ""
                values += f'<td class="{marked}">{with_deviation(name, metric, "value")}</td>'
                floors += f"<td>{with_deviation(name, metric, 'floor')}</td>"
        rows.append(f'<tr><th>{title}</th>{values}</tr><tr class="floor"><th>floor</th>{floors}</tr>')
    return (
        "<p>Means and standard deviations over random splits of the real test images, in brackets 95% intervals. The "
        "floor is the same metric of real images against real images, in the same numbers. Coloured: by chance, one "
        f"metric in a thousand is so far from its floor.</p><table>{head}{''.join(rows)}</table>"
    )


def _heads(names: Sequence[str], columns: int = 1) -> str:
    return "".join(f'<th colspan="{columns}">{html.escape(name)}</th>' for name in names)


def with_deviation(name: str, metric: dict[str, Any], key: str) -> str:
    """The "value" or "floor" of a metric with its 95% interval, where it has one, or else its standard deviation."""
    if metric[key] is None:
        return number(name, None)
    if key == "value" and "interval" in metric:
        return f"{number(name, metric[key])} ({_interval(metric)})"
    return f"{number(name, metric[key])} ± {number(name, metric[f'{key}_std'], 2)}"


def _interval(metric: dict[str, Any]) -> str:
    low, high = metric["interval"]
    return f"{low:.1%} to {high:.1%}"


def _some(sample: Sample, label: int, count: int = _SHOWN) -> Tensor:
    """The first images of a class."""
    return sample.read(torch.nonzero(sample.measured["label"] == label).flatten()[:count])


def _is_classified(sample: Sample) -> bool:
    """Whether there are classes to be told apart."""
    return "probabilities" in sample.measured


def _confusion(sample: Sample) -> np.ndarray:
    """Counts (k, k) for k classes; row i, column j: images of class i that the classifier calls class j."""
    k, called = len(sample.dataset.classes), sample.measured["probabilities"].argmax(1)
    return torch.bincount(sample.measured["label"] * k + called, minlength=k * k).view(k, k).numpy()


def _accuracy(sample: Sample) -> str:
    counts = _confusion(sample)
    low, high = wilson_interval(counts.trace() / counts.sum(), counts.sum())
    return f"{sample.name}: {counts.trace() / counts.sum():.1%} ({low:.1%} to {high:.1%})"


def _bands_figure(samples: Sequence[Sample], name: str, xlabel: str, ylabel: str) -> Figure:
    axis = np.arange(samples[0].measured[name].shape[1])
    axis = (axis + 0.5) * scale_of(samples[0].real)[0] if name == "profile" else axis
    return plots.bands(axis, _panels(samples, name), xlabel, ylabel, log=name == "spectrum")


def _panels(samples: Sequence[Sample], name: str) -> dict[str, dict[str, np.ndarray]]:
    """A measurement: class -> sample -> values."""

    def of_class(sample: Sample, label: int) -> np.ndarray:
        return sample.measured[name][sample.measured["label"] == label].numpy()

    classes = enumerate(samples[0].dataset.classes)
    return {of: {sample.name: of_class(sample, label) for sample in samples} for label, of in classes}


def _lens_equation(samples: Sequence[Sample]) -> str:
    smooth = recipe_behind(samples[0].real).smooth_classes
    unexplained = (f"{(~sample.measured['explained']).double().mean():.1%} of {sample.name}" for sample in samples)
    return _section(
        "Lens equation",
        "What the best-fitting smooth lens of the recipe leaves over, in units of the peak. For "
        f"{', '.join(smooth)} it is the error of the generator; for the others the signal of the substructure, whose "
        f"distribution must match. Images that no smooth lens explains: {', '.join(unexplained)}.",
        plots.histograms(_panels(samples, "lens_residual"), "residual (RMS over peak)"),
        *(_residual_figure(sample) for sample in samples),
    )


def _obedience(name: str, found: Obedience) -> str:
    """The section on a generator that was asked for the parameters of test images."""
    tables = "".join(
        f"<h3>{title}</h3><table>"
        + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        + "</table>"
        for title, rows in _obedience_tables(found).items()
    )
    errors = {of_class: {"generated": values} for of_class, values in found["errors"].items()}
    figures = [plots.histograms(errors, "error (RMS over peak)")]
    figures += [plots.recovery(found["panels"])] if found.get("panels", {}).get("real") else []
    worst = {title: images.numpy() for title, images in found["worst"].items()}
    figures.append(plots.image_grid(worst, "the worst of all", ["difference, ±0.05"], found["captions"]))
    text = (
        "Test images drawn anew from their class and parameters. The error is that of every pixel against the test "
        "image itself; values are those that a regressor reads off generated and off real images."
    )
    return _section(f"Asked for by parameters: {name}", text, *figures) + _folded("Parameters in numbers", tables)


def _obedience_tables(found: Obedience) -> dict[str, list[list[str]]]:
    """Title -> rows of cells, the first of which is the head."""
    emulation = found["emulation"]
    keys = {"given": "error", "median": "median", "worst": "worst"}
    keys |= {"common": "by what every class has", "class": "by class alone"}
    there = next(iter(emulation.values()))
    keys = {key: title for key, title in keys.items() if key in there}
    keys |= {noise: f"noise of {noise}" for noise in there if noise not in keys}
    tables = {
        "Emulation, RMS over peak": [
            ["RMS over peak", *keys.values()],
            *([name, *(f"{100 * row[key]:.3g}%" for key in keys)] for name, row in emulation.items()),
        ]
    }
    if "recovery" in found:
        generated, real = found["recovery"]["generated"], found["recovery"]["real"]
        tables["Recovery, of generated and of real images"] = [
            ["parameter", "R^2", "R^2, real", "bias", "scatter", "scatter, real", "in order"],
            *(
                [f"{name} ({row['unit']})" if row["unit"] else name, f"{row['r2']:.4f}", f"{real[name]['r2']:.4f}"]
                + [f"{value:.3g}" for value in (row["bias"], row["scatter"], real[name]["scatter"])]
                + [f"{found['order'][name]:.3f}" if name in found["order"] else "-"]
                for name, row in generated.items()
            ),
        ]
    if conditionals := found.get("conditionals"):
        tables["Free parameters, W1 over their deviation, where those of every class are given"] = [
            ["free parameter", "W1", "floor"],
            *([name, f"{row['value']:.3g}", f"{row['floor']:.3g}"] for name, row in conditionals.items()),
        ]
    return tables


def _residual_figure(sample: Sample, count: int = 6) -> Figure:
    """Images of each class above what the best smooth lens leaves over, ten times as bright around grey."""
    from metrics.lens_equation import fit_smooth_lens  # here: lenstronomy is slow to import, and not all images need it

    rows, signed = {}, []
    for label, name in enumerate(sample.dataset.classes):
        images = _some(sample, label, count)
        rows[f"{name}\n{sample.name}"] = images.numpy()
        signed.append(f"{name}\nresidual, ±0.05")
        rows[signed[-1]] = fit_smooth_lens(images)[1].numpy()
    return plots.image_grid(rows, signed=signed)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


@plots.own_style
def _section(title: str, text: str, *figures: Figure) -> str:
    images = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=90)
        data = base64.b64encode(file.getvalue()).decode()
        images.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">')
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{''.join(images)}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Generated lenses against real ones</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }}
th, td {{ padding: 3px 8px; text-align: right; white-space: nowrap; }}
tr > :first-child {{ text-align: left; font-weight: normal; }}
tr.floor > * {{ color: #777; font-size: 12px; padding-bottom: 7px; border-bottom: 1px solid #ccc; }}
tr.floor > :first-child {{ padding-left: 2em; }}
td.apart, td.near {{ background: #fde8d0; }}
td.floor {{ background: #dff0d8; }}
td.off {{ background: #f5c6cb; }}
summary {{ font-size: 1.5em; font-weight: bold; margin: 0.8em 0; cursor: pointer; }}
img {{ max-width: 100%; vertical-align: top; }}
</style></head><body>
<h1>Generated lenses against real ones</h1>
{body}
</body></html>
"""
