"""The scores as a table on the terminal, as report.json and as report.html, one page with every picture in it."""

import base64
import hashlib
import html
import io
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import plots
from dataset import CLASSES, NpyDataset
from evaluate import metrics, physics
from evaluate.figures import DISTANCES, PARTS, SHARES, TITLES, Reference, apart
from evaluate.lens_fit import fit_smooth_lens
from evaluate.measure import Sample
from files import whole

PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "lenstronomy")
_SHOWN = 8  # images of a class in the grids


def print_table(sample: Sample, count: int) -> None:
    """Each figure with its floor and, of the Fréchet distances, the ratio of the two."""
    rows = [(f"{count} images a class", PARTS)]
    for name, title in TITLES.items():
        of_parts = [sample.figures[name][part] for part in PARTS]
        if of_parts[0]["value"] is None:
            continue
        space = f" ({title.split(', ')[1]})" if name in DISTANCES else ""
        rows.append((title, [_number(name, x["value"]) for x in of_parts]))
        if "interval" in of_parts[0]:
            rows.append(("  95% interval", [_interval(x) for x in of_parts]))
        floor = "  classifier accuracy, real" if name == "class_accuracy" else f"  floor: real against real{space}"
        rows.append((floor, [with_spread(name, x, "floor") for x in of_parts]))
        if name in DISTANCES:
            rows.append((f"  ratio to the floor{space}", [_number(name, ratio(x)) for x in of_parts]))
    width = max(len(row[0]) for row in rows)
    print(f"\n{sample.name}")
    for title, cells in rows:
        print(f"{title:{width}}" + "".join(f"{cell:>20}" for cell in cells))
    print()


def ratio(figure: dict[str, Any]) -> float:
    """A figure over its floor."""
    return figure["value"] / figure["floor"] if figure["floor"] else math.inf


def write_lenses(path: str, real: Sample, sample: Sample) -> None:
    """A row of real and a row of generated lenses for each class, with the class's scores beside them."""
    rows = {}
    for label, name in enumerate(CLASSES):
        rows[f"{name}\nreal"] = _some(real, label).numpy()
        distance = ratio(sample.figures["frechet_lens"][name])
        accuracy = sample.figures["class_accuracy"][name]["value"]
        scores = f"Fréchet {distance:.1f} x floor\nclassifier {accuracy:.0%}"
        rows[f"{name}\ngenerated\n{scores}"] = _some(sample, label).numpy()
    plots.save(plots.image_grid(rows), path)


def write_json(path: Path, settings: dict[str, Any], samples: list[Sample], reference: Reference) -> None:
    """report.json: the figures of the first sample, those of the second under "compared", and how they were made."""
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
        "figures": samples[0].figures,
        "lens_fit": {sample.name: _lens_fit(sample) for sample in (reference.sample, *samples)},
        "confusion": {sample.name: _confusion(sample).tolist() for sample in (reference.sample, *samples)},
        "compared": [{"source": sample.source, "figures": sample.figures} for sample in samples[1:]],
    }
    with whole(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def sha256(path: str | Path) -> str:
    """The checksum of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _lens_fit(sample: Sample) -> dict[str, dict[str, float]]:
    """Of each class, the share of images that no smooth lens explains and the residual of the best one."""
    found = {}
    for label, name in enumerate(CLASSES):
        of_class = sample.measured["label"] == label
        residual = sample.measured["lens_residual"][of_class]
        unexplained = (~sample.measured["explained"][of_class]).double().mean().item()
        found[name] = {
            "unexplained_share": unexplained,
            "residual_mean": residual.mean().item(),
            "residual_median": residual.median().item(),
        }
    return found


def write_html(path: Path, settings: dict[str, Any], samples: list[Sample], reference: Reference) -> None:
    """report.html: self-contained, the figures with their floors in columns and the pictures below."""
    everyone = (reference.sample, *samples)
    sections = [_scores(samples, settings["NUM_SPLITS"])]
    grid = {}
    for label, name in enumerate(CLASSES):
        grid |= {f"{name}\n{sample.name}": _some(sample, label).numpy() for sample in (reference.sample, *samples)}
    sections.append(_section("Images", "The first images of each class.", plots.image_grid(grid)))
    sections.append(
        _section(
            "Radial profile and power spectrum",
            "Median and, shaded for real and dashed for generated images, the 5% to 95% range.",
            _bands_figure(everyone, "profile", "distance from the centre (arcsec)", "brightness over peak"),
            _bands_figure(everyone, "spectrum", "wave number (cycles an image)", "power"),
        )
    )
    sections.append(
        _section(
            "Lens equation",
            "What the smooth lens of the recipe that fits best leaves over, in units of the peak. For no_sub it is the "
            "error of the generator; for axion and cdm the signal of the substructure, whose distribution must match. "
            f"Images that no smooth lens explains: {', '.join(map(_unexplained, everyone))}.",
            plots.histograms(
                {
                    name: {sample.name: _of_class(sample, "lens_residual", label) for sample in everyone}
                    for label, name in enumerate(CLASSES)
                },
                "residual (RMS over peak)",
            ),
            *(_residual_figure(sample) for sample in everyone),
        )
    )
    sections.append(
        _section(
            "Classifier",
            "; ".join(_accuracy(sample) for sample in everyone) + " (95% Wilson intervals).",
            *(plots.confusion_matrix(_confusion(sample), CLASSES, sample.name) for sample in everyone),
        )
    )
    for sample in samples:
        sections.append(
            _section(
                f"Nearest training images: {sample.name}",
                "The eight images closest to a training image, above the training image; distance as RMS over peak, at "
                "half the resolution.",
                _neighbours_figure(sample, reference.train),
            )
        )
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    sections.append(f"<h2>Settings</h2><table>{rows}</table>")
    with whole(path) as file:
        file.write(_PAGE.format(body="\n".join(sections)).encode("utf-8", "replace"))


def _scores(samples: list[Sample], splits: int) -> str:
    """The table of figures: a row of values, a column for each part and sample, and a row of floors below it."""
    head = f"<tr><th></th>{''.join(f'<th colspan={len(samples)}>{part}</th>' for part in PARTS)}</tr>"
    if len(samples) > 1:
        head += "<tr><th></th>" + "".join(f"<th>{html.escape(s.name)}</th>" for s in samples) * len(PARTS) + "</tr>"
    rows = []
    for name, title in TITLES.items():
        if all(sample.figures[name]["overall"]["value"] is None for sample in samples):
            continue
        values, floors = "", ""
        for part in PARTS:
            for figure in (sample.figures[name][part] for sample in samples):
                verdict = "apart" if apart(figure, splits) else ""
                values += f'<td class="{verdict}">{with_spread(name, figure, "value")}</td>'
            floors += f'<td colspan="{len(samples)}">{with_spread(name, samples[0].figures[name][part], "floor")}</td>'
        rows.append(f'<tr><th>{title}</th>{values}</tr><tr class="floor"><th>floor</th>{floors}</tr>')
    return (
        "<h2>Scores</h2><p>Means and standard deviations over random splits of the real test images, in brackets 95% "
        "intervals. The floor is the "
        "same figure of real images against real images, in the same numbers. Coloured: farther from "
        f"the floor than chance takes one figure in a thousand.</p><table>{head}{''.join(rows)}</table>"
    )


def with_spread(name: str, figure: dict[str, Any], key: str) -> str:
    """The "value" or "floor" of a figure with its 95% interval, where it has one, or else its standard deviation."""
    if figure[key] is None:
        return "–"
    if key == "value" and "interval" in figure:
        return f"{_number(name, figure[key])} ({_interval(figure)})"
    return f"{_number(name, figure[key])} ± {_number(name, figure[f'{key}_std'], 2)}"


def _some(sample: Sample, label: int, count: int = _SHOWN) -> Tensor:
    """The first images of a class."""
    return sample.read(torch.nonzero(sample.measured["label"] == label).flatten()[:count])


def _confusion(sample: Sample) -> np.ndarray:
    """Counts (3, 3); row i, column j: images of class i that the classifier calls class j."""
    called = sample.measured["probabilities"].argmax(1)
    return torch.bincount(sample.measured["label"] * 3 + called, minlength=9).view(3, 3).numpy()


def _interval(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{low:.1%} to {high:.1%}"


def _number(name: str, value: float, digits: int = 3) -> str:
    return f"{value:.1%}" if name in SHARES else f"{value:.{digits}g}"


def _unexplained(sample: Sample) -> str:
    return f"{(~sample.measured['explained']).double().mean():.1%} of {sample.name}"


def _accuracy(sample: Sample) -> str:
    counts = _confusion(sample)
    low, high = metrics.wilson_interval(counts.trace() / counts.sum(), counts.sum())
    return f"{sample.name}: {counts.trace() / counts.sum():.1%} ({low:.1%} to {high:.1%})"


def _of_class(sample: Sample, name: str, label: int) -> np.ndarray:
    return sample.measured[name][sample.measured["label"] == label].numpy()


def _bands_figure(samples: tuple[Sample, ...], name: str, xlabel: str, ylabel: str) -> Figure:
    axis = np.arange(samples[0].measured[name].shape[1])
    axis = (axis + 0.5) * physics.PIXEL_SCALE if name == "profile" else axis
    curves = {
        class_name: {sample.name: _of_class(sample, name, label) for sample in samples}
        for label, class_name in enumerate(CLASSES)
    }
    return plots.bands(axis, curves, xlabel, ylabel, log=name == "spectrum")


def _residual_figure(sample: Sample, count: int = 6) -> Figure:
    """Images of each class above what the best smooth lens leaves over, ten times as bright around grey."""
    rows = {}
    for label, name in enumerate(CLASSES):
        images = _some(sample, label, count)
        rows[f"{name}\n{sample.name}"] = images.numpy()
        rows[f"{name}\nresidual, ±0.05"] = fit_smooth_lens(images)[1].numpy()
    return plots.image_grid(rows, signed={name for name in rows if "residual" in name})


def _neighbours_figure(sample: Sample, train: NpyDataset) -> Figure:
    closest = sample.measured["train_distance"].argsort()[:_SHOWN]
    distances = ", ".join(f"{d:.4f}" for d in sample.measured["train_distance"][closest].tolist())
    rows = {
        sample.name: sample.read(closest).numpy(),
        "nearest\ntraining image": train.read(sample.measured["train_neighbour"][closest]).numpy(),
    }
    return plots.image_grid(rows, f"distances {distances}")


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
td.apart {{ background: #fde8d0; }}
img {{ max-width: 100%; vertical-align: top; }}
</style></head><body>
<h1>Generated lenses against real ones</h1>
{body}
</body></html>
"""
