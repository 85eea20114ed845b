"""The pictures that scripts write: image grids, training curves, confusion matrices and other plots."""

import csv
import gc
import io
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import nanodit_path  # noqa: F401
from files import whole
from settings import InputError

_SOFTENING = 0.05  # brightness of colours above which they are shown on a logarithmic scale
_FORMATS = ("png", "pdf", "svg", "jpg")
own_style = style.context("default")  # for every function that draws: a matplotlibrc must not change the pictures


@own_style
def image_grid(
    rows: dict[str, np.ndarray], title: str = "", signed: Collection[str] = (), captions: Sequence[str] = ()
) -> Figure:
    """Rows of lens images, each with its name to the left.

    Args:
        rows: name of each row and its images, (n, h, w) or (n, c, h, w) in [0, 1]; see ``stretched``.
        signed: names of rows that hold differences of images; they are shown from -0.05 to 0.05.
        captions: of the columns.
    """
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 * columns + 2, 1.25 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title(_literal(caption), fontsize="small")
    for axes_of_row, (name, images) in zip(axes, rows.items(), strict=True):
        axes_of_row[0].set_ylabel(_literal(name), rotation=0, ha="right", va="center")
        shown = {"cmap": "inferno", "vmin": 0, "vmax": 1}
        if name in signed:
            shown = {"cmap": "RdBu_r", "vmin": -0.05, "vmax": 0.05}
        for axis, image in zip(axes_of_row, images, strict=False):
            channels = np.asarray(image).reshape(-1, *image.shape[-2:])
            axis.imshow(channels.mean(0) if name in signed else stretched(channels), origin="lower", **shown)
    figure.suptitle(_literal(title))
    return figure


def stretched(channels: np.ndarray) -> np.ndarray:
    """An image (c, h, w) in [0, 1] as it is shown: (h, w), or (h, w, 3) if its channels are red, green and blue.

    Black is one standard deviation of the noise below the sky. Colours are brightened by asinh, which keeps their
    ratios (Lupton et al. 2004, astro-ph/0312483). Any number of channels but three is shown as the mean of these.
    """
    light = channels if len(channels) == 3 else channels.mean(0, keepdims=True)
    sky = np.median(light, (1, 2), keepdims=True)
    noise = 1.4826 * np.median(np.abs(light - sky), (1, 2), keepdims=True)
    light = np.clip((light - sky + noise) / (1 - sky + noise).clip(1e-6), 0, 1)
    if len(light) == 1:
        return light[0]
    mean = light.mean(0).clip(1e-6)
    softening = max(3 * noise.mean(), _SOFTENING)
    brightened = np.arcsinh(mean / softening) / np.arcsinh(1 / softening) / mean
    return np.moveaxis(light * brightened, 0, 2).clip(0, 1)


@own_style
def training_curves(folder: str | Path, history: list[dict[str, float]], panels: list[list[str]]) -> None:
    """Writes training_metrics.csv, a row an epoch, and training_metrics.png, a panel for each list of its columns."""
    folder = Path(folder)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0].keys())
    writer.writeheader()
    writer.writerows(history)
    with whole(folder / "training_metrics.csv") as file:
        file.write(table.getvalue().encode())
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    epochs = [row["epoch"] for row in history]
    for axis, columns in zip(axes[0], panels, strict=True):
        for column in columns:
            marker = "." if len(epochs) < 30 else ""
            axis.plot(epochs, [row[column] for row in history], marker=marker, label=column.replace("_", " "))
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
        positive = any(row[column] > 0 for row in history for column in columns)
        if positive and not any("accuracy" in column for column in columns):
            axis.set_yscale("log")
    save(figure, folder / "training_metrics.png")


@own_style
def confusion_matrix(counts: np.ndarray, classes: tuple[str, ...], title: str = "") -> Figure:
    """A confusion matrix: counts[i, j] images of class i classified as class j, with their share of class i."""
    size = max(4.0, 0.9 * len(classes))
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        color = "white" if share[i, j] > 0.5 else "black"
        axis.text(j, i, f"{count}\n{share[i, j]:.1%}", ha="center", va="center", color=color)
    names = [_literal(name) for name in classes]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="called", ylabel="true", title=_literal(title))
    return figure


@own_style
def bands(
    x: np.ndarray, panels: dict[str, dict[str, np.ndarray]], xlabel: str, ylabel: str, log: bool = False
) -> Figure:
    """Median and 5% to 95% range of curves: panel -> name -> (n, len(x)); the range of the first name is shaded."""
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (name, values) in enumerate(curves.items()):
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
            color = f"C{number}"
            axis.plot(x, middle, color=color, label=_literal(name))
            if number == 0:
                axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
            else:
                axis.plot(x, low, x, high, color=color, linestyle="--", linewidth=0.8)
        axis.set(title=_literal(title), xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
    axis.legend()
    return figure


@own_style
def histograms(panels: dict[str, dict[str, np.ndarray]], xlabel: str) -> Figure:
    """Distributions of positive numbers on a logarithmic axis: panel -> name -> (n,)."""
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, samples) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        low, high = (reduce(np.concatenate(list(samples.values()))) for reduce in (np.min, np.max))
        edges = np.geomspace(max(low, 1e-9), max(high, 2e-9), 41)
        for name, values in samples.items():
            share = np.full(len(values), 1 / len(values))
            within = values.clip(edges[0], edges[-1])
            axis.hist(within, edges, weights=share, histtype="step", linewidth=1.5, label=_literal(name))
        axis.set(title=_literal(title), xlabel=xlabel, ylabel="share of images", xscale="log")
        axis.set_xlim(10 ** np.floor(np.log10(edges[0])), 10 ** np.ceil(np.log10(edges[-1])))  # labels at decades alone
        axis.grid(alpha=0.3)
    axis.legend()
    return figure


@own_style
def recovery(rows: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], xlabel: str = "asked for") -> Figure:
    """Values read off images against those asked for: row -> panel -> (asked, read (n,)); columns share axes."""
    columns = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(3.2 * columns, 3.2 * len(rows)), layout="constrained")
    for axes, (name, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, (asked, read)) in zip(axes, panels.items(), strict=False):
            both = [values for panels in rows.values() for values in panels.get(title, ())]
            ends = min(map(np.min, both)), max(map(np.max, both))
            axis.plot(ends, ends, color="0.6", linewidth=0.8)
            axis.plot(asked, read, ".", markersize=2.5, alpha=0.5)
            axis.set(title=_literal(title), xlabel=xlabel, ylabel=f"read, {_literal(name)}", xlim=ends, ylim=ends)
            axis.grid(alpha=0.3)
    return figure


def _literal(text: str) -> str:
    """A text that is drawn as it is, dollars included; names of folders may be anything, even invalid UTF-8."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def check_format(path: str | Path) -> None:
    """Raises InputError unless figures can be written to a path, in the format that its ending names."""
    if Path(path).suffix[1:].lower() not in _FORMATS:
        raise InputError(f"{path}: its name must end in one of {', '.join(f'.{ending}' for ending in _FORMATS)}")
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder: give the picture another name")


@own_style
def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the ending of its path names, making its folder when there is none."""
    with whole(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class may have a name that the font has no letters for
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:].lower())
    gc.collect()  # the parts of a figure refer to each other, and memory would grow until Python looks for such cycles
