"""Physical parameters are read from tables, pickled files and headers, and turned into what a network sees and back."""

import warnings

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import Table

from dataset import NpyDataset
from parameters import Column, Parameter, as_plain, asked, fit, from_plain, objects, phases
from settings import InputError


def write_images(root, files, kind=".npy"):
    random = np.random.default_rng(0)
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, random.random((16, 16)))


def values_of(root, *names, split="all"):
    images = NpyDataset(root, None, split, on_missing_class="go_on")
    columns = images.columns(names)
    return dict(zip(images.files, np.stack([columns[name].values for name in names], 1).tolist(), strict=True))


def same(found, expected):
    assert found.keys() == expected.keys()
    for file, values in expected.items():
        np.testing.assert_allclose(found[file], values, equal_nan=True, err_msg=file)


# Where they are read


def test_the_table_of_the_simulator_has_the_source_and_the_heaviest_subhaloes_first(lens_data):
    table = Table.read(lens_data / "parameters.fits")
    row = next(row for row in table if row["class"] == "cdm" and row["index"] == 7)
    order = np.argsort(-row["subhalo_mass"])
    names = ("source_x", "source_y", "subhalo_mass_1", "subhalo_x_1", "subhalo_y_3", "subhalo_mass_total", "axion_mass")
    expected = [*row["source_xy"], row["subhalo_mass"].max(), row["subhalo_xy"][order[0], 0]]
    expected += [row["subhalo_xy"][order[2], 1], row["subhalo_mass"].sum(), np.nan]
    np.testing.assert_allclose(values_of(lens_data, *names)["cdm/7.npy"], expected, equal_nan=True)
    columns = NpyDataset(lens_data).columns(["subhalo_mass_25", "vortex_angle", "subhalo_x_25"])
    assert [column.unit for column in columns.values()] == ["solMass", "rad", "arcsec"]
    assert np.isfinite(columns["vortex_angle"].values).sum() == 48


def test_a_csv_names_files_by_path_or_by_name_alone_and_may_lack_values(tmp_path):
    write_images(tmp_path, ["a/0.npy", "a/1.npy", "b/0.npy", "b/only.npy"])
    rows = "image, mass [solMass] ,theta_E (arcsec),note\na/0.npy,1e12,1.2,x\nonly.npy,2e12,,y\nb/0.npy,,0.9,\n"
    rows += "gone.npy,5,5,\n"
    (tmp_path / "parameters.csv").write_text(rows)
    nan = np.nan
    expected = {"a/0.npy": [1e12, 1.2], "a/1.npy": [nan, nan], "b/0.npy": [nan, 0.9], "b/only.npy": [2e12, nan]}
    same(values_of(tmp_path, "mass", "theta_E"), expected)
    columns = NpyDataset(tmp_path).columns(["mass", "theta_E"])
    assert [column.unit for column in columns.values()] == ["solMass", "arcsec"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile;z\r\na/0.npy;1.5\r\nb/0.npy;NA\r\n",
        "file\tz\n./a/0.npy\t1.5\nb\\0.npy\tN/A\n",
        'z , File\n1.5, "a/0.npy"\n-- , b/0.npy\n',
        "file,z\na/0.npy,1.5\nb/0.npy,NULL\n",
    ],
    ids=["semicolons, a byte order mark and Windows", "tabs and other paths", "spaces and quotes", "as of a database"],
)
def test_a_csv_is_read_as_people_write_it(text, tmp_path):
    write_images(tmp_path, ["a/0.npy", "b/0.npy"])
    (tmp_path / "parameters.csv").write_text(text, "utf-8", newline="")
    same(values_of(tmp_path, "z"), {"a/0.npy": [1.5], "b/0.npy": [np.nan]})


def test_a_table_of_the_training_images_alone_leaves_the_others_unknown(tmp_path):
    write_images(tmp_path, ["train/a/0.npy", "val/a/0.npy", "test/a/0.npy"])
    (tmp_path / "train" / "parameters.csv").write_text("file,z\na/0.npy,1\n")
    assert values_of(tmp_path, "z", split="train") == {"train/a/0.npy": [1.0]}
    same(values_of(tmp_path, "z", split="val"), {"val/a/0.npy": [np.nan]})
    images = NpyDataset(tmp_path)
    with pytest.raises(InputError, match="no parameter q"):
        images.columns(["q"])
    assert np.isnan(images.columns(["q"], lenient=True)["q"].values).all()


def test_tables_of_different_units_are_converted_or_one_line(tmp_path):
    write_images(tmp_path, ["train/a/0.npy", "val/a/0.npy", "test/a/0.npy"])
    for split, unit in {"train": "deg", "val": "rad", "test": "degrees"}.items():
        (tmp_path / split / "parameters.csv").write_text(f"file,phi [{unit}],m [solMass]\na/0.npy,1.5,2\n")
    images = NpyDataset(tmp_path, on_missing_class="go_on")
    found = images.columns(["phi"])["phi"]
    in_degrees = dict(zip(images.files, np.degrees(found.values) if found.unit == "rad" else found.values, strict=True))
    expected = {"train/a/0.npy": 1.5, "val/a/0.npy": np.degrees(1.5), "test/a/0.npy": 1.5}
    assert in_degrees == pytest.approx(expected)
    (tmp_path / "val" / "parameters.csv").write_text("file,phi [deg],m [kg]\na/0.npy,1.5,1\n")
    images = NpyDataset(tmp_path, on_missing_class="go_on")
    in_kg = dict(zip(images.files, (of := images.columns(["m"])["m"]).values, strict=True))
    assert in_kg["val/a/0.npy"] / in_kg["train/a/0.npy"] == pytest.approx(1 / (2 * 1.988e30), rel=1e-3), of.unit
    for unit in ("s", "furlongs per"):
        (tmp_path / "val" / "parameters.csv").write_text(f"file,phi,m [{unit}]\na/0.npy,1.5,1\n")
        with pytest.raises(InputError, match=f"parameter m: is in .*{unit}"):
            NpyDataset(tmp_path, on_missing_class="go_on").columns(["m"])


def test_values_reach_a_network_in_the_unit_it_was_trained_in(tmp_path):
    write_images(tmp_path, ["a/0.npy", "a/1.npy"])
    (tmp_path / "parameters.csv").write_text(
        "file,x [mas],phi [Deg],q,d [mpc]\na/0.npy,250,180,0.5,5e8\na/1.npy,500,90,1,1e9\n"
    )
    known = [
        parameter(name="x", unit="arcsec"),
        parameter("angle", name="phi", unit="rad", mean=0.0, deviation=1.0, period=2 * np.pi),
        parameter(name="q", unit="any"),
        parameter(name="d", unit="Mpc"),  # a thousand million of the other, whose name differs by its case
    ]
    expected = [[-0.5, np.pi, 0, 0], [0, np.pi / 2, 1, 1]]
    np.testing.assert_allclose(NpyDataset(tmp_path).phases(known), expected, atol=1e-6)


def test_titles_of_columns_have_a_name_of_their_own(tmp_path):
    write_images(tmp_path, ["a/0.npy"])
    (tmp_path / "parameters.csv").write_text("file,log(M200),log(c) [dex],theta_E (arcsec),index\na/0.npy,1,2,3,4\n")
    columns = NpyDataset(tmp_path).columns(["log(M200)", "log(c)", "theta_E", "index"])
    found = {name: (column.values[0], column.unit) for name, column in columns.items()}
    assert found == {"log(M200)": (1, ""), "log(c)": (2, "dex"), "theta_E": (3, "arcsec"), "index": (4, "")}
    (tmp_path / "parameters.csv").write_text("file,mass [kg],mass [solMass]\na/0.npy,1,2\n")
    with pytest.raises(InputError, match="has two columns mass"):
        NpyDataset(tmp_path).columns(["mass"])


def test_a_table_in_a_class_folder_is_no_image(tmp_path):
    write_images(tmp_path, ["a/0.npy", "b/0.npy"])
    Table({"file": ["0.npy"], "z": [1.5]}).write(tmp_path / "a" / "parameters.fits")
    same(values_of(tmp_path, "z"), {"a/0.npy": [1.5], "b/0.npy": [np.nan]})


def test_a_table_of_other_images_is_said_and_left_out_where_nothing_is_trained(tmp_path, capsys):
    write_images(tmp_path, ["a/0.npy"])
    (tmp_path / "parameters.csv").write_text("H0,Om0\n70,0.3\n")
    assert np.isnan(NpyDataset(tmp_path).columns(["z"], lenient=True)["z"].values).all()
    assert "no row is of a file in its folder: it begins with 70" in capsys.readouterr().out
    (tmp_path / "parameters.csv").write_text("file,z\n")
    assert np.isnan(NpyDataset(tmp_path).columns(["z"], lenient=True)["z"].values).all()
    assert "no row is of a file in its folder: it is empty" in capsys.readouterr().out


def write_headers(root, *cards):
    """A FITS file a/k.fits for each PHI card, given as a value, or as a value with a comment."""
    (root / "a").mkdir()
    for k, card in enumerate(cards):
        header = fits.Header()
        header["PHI"] = card
        fits.PrimaryHDU(np.random.default_rng(k).random((16, 16)), header).writeto(root / "a" / f"{k}.fits")


def test_headers_have_units_of_their_own(tmp_path):
    write_headers(tmp_path, 1.0, (180.0, "[deg] angle"), (1.0, "[rad] angle"), 90, True, "north")
    columns = NpyDataset(tmp_path).columns(["PHI"])
    assert columns["PHI"].unit == "deg"
    np.testing.assert_allclose(columns["PHI"].values, [1, 180, 180 / np.pi, 90, np.nan, np.nan])


def test_headers_of_other_things_are_one_line(tmp_path):
    write_headers(tmp_path, (1.0, "[kg] mass"), (1.0, "[arcsec] angle"))
    with pytest.raises(InputError, match="PHI: is in arcsec, and in kg elsewhere"):
        NpyDataset(tmp_path).columns(["PHI"])


def test_a_name_that_two_files_share_is_one_line(tmp_path, capsys):
    write_images(tmp_path, ["a/0.npy", "b/0.npy", "b/1.npy"])
    (tmp_path / "parameters.csv").write_text("file,z\n0.npy,1\n1.npy,2\n")
    fault = "several files are called 0.npy: name folders, too, as in a/0.npy"
    with pytest.raises(InputError, match=fault):
        NpyDataset(tmp_path).columns(["z"])
    found = NpyDataset(tmp_path).columns(["z"], lenient=True)["z"].values
    np.testing.assert_equal(found, [np.nan, np.nan, 2.0])
    assert fault in capsys.readouterr().out


def test_rows_of_no_image_are_counted(tmp_path, capsys):
    write_images(tmp_path, ["a/0.npy", "a/1.npy"])
    (tmp_path / "parameters.csv").write_text("file,z\na/0.npy,1\na/7.npy,2\na/8.npy,3\n")
    same(values_of(tmp_path, "z"), {"a/0.npy": [1.0], "a/1.npy": [np.nan]})
    assert "parameters.csv: 2 of its 3 rows are of no image here, the first of a/7.npy" in capsys.readouterr().out
    (tmp_path / "parameters.csv").write_text("file,z\na/0.npy,1\na/1.npy,2\n")
    values_of(tmp_path, "z")
    assert "rows" not in capsys.readouterr().out


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_cells_may_be_empty_whatever_divides_them(delimiter, tmp_path):
    write_images(tmp_path, ["a/0.npy", "a/1.npy", "a/2.npy", "a/3.npy"])
    rows = ["file,x,y,z", "a/0.npy,,,3", "a/1.npy,1,,", "a/2.npy, 2 ,-, nan", "a/3.npy,,,"]
    (tmp_path / "parameters.csv").write_text("\n".join(rows).replace(",", delimiter) + "\n")
    nan = np.nan
    expected = {"a/0.npy": [nan, nan, 3], "a/1.npy": [1, nan, nan], "a/2.npy": [2, nan, nan], "a/3.npy": [nan] * 3}
    same(values_of(tmp_path, "x", "y", "z"), expected)


def test_tables_may_stand_in_folders_of_splits_and_classes_and_beside(tmp_path):
    root = tmp_path / "data"
    write_images(root, ["a/0.npy", "b/1.npy"])
    write_images(tmp_path / "data_test", ["a/0.npy", "b/5.npy"])
    (root / "a").joinpath("parameters.csv").write_text("file,z\n0.npy,1\n")
    (root / "parameters.csv").write_text("file,z\nb/1.npy,2\n")
    (tmp_path / "data_test" / "parameters.csv").write_text("file,z\na/0.npy,3\nb/5.npy,4\n")
    files = {"a/0.npy": [1.0], "b/1.npy": [2.0], "../data_test/a/0.npy": [3.0], "../data_test/b/5.npy": [4.0]}
    same(values_of(root, "z"), files)


def test_images_of_a_stack_are_rows_too(tmp_path):
    np.save(tmp_path / "one.npy", np.random.default_rng(0).random((20, 16, 16)))
    np.save(tmp_path / "two.npy", np.random.default_rng(1).random((20, 16, 16)))
    (tmp_path / "parameters.csv").write_text("file,z\none.npy#3,1.5\ntwo.npy#0,2.5\n")
    found = values_of(tmp_path, "z")
    assert (found["one.npy#3"], found["two.npy#0"]) == ([1.5], [2.5])
    assert np.isnan([value for (value,) in found.values()]).sum() == 38
    (tmp_path / "parameters.csv").write_text("class,index,z\ntwo,7,0.5\none,0,3.5\n")
    found = values_of(tmp_path, "z")
    assert (found["one.npy#0"], found["two.npy#7"]) == ([3.5], [0.5])


def test_a_file_with_a_hash_in_its_name_makes_no_stack_of_the_others(tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("0.npy", "best#1.npy"):
        np.save(tmp_path / "one" / name, np.random.default_rng(0).random((16, 16)))
    (tmp_path / "parameters.csv").write_text("class,index,z\none,0,3.5\n")
    assert values_of(tmp_path, "z")["one/0.npy"] == [3.5]


def test_pickled_values_and_fits_headers_are_parameters(tmp_path):
    packed = np.empty(5, object)
    packed[:] = [np.random.default_rng(0).random((16, 16)), 1e-23, 0.5, 0.1, 2.0]
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", packed, allow_pickle=True)
    header = fits.Header()
    header["THETA_E"] = (1.25, "[arcsec] Einstein radius")
    fits.PrimaryHDU(np.random.default_rng(0).random((16, 16)), header).writeto(tmp_path / "a" / "1.fits")
    fits.PrimaryHDU(np.random.default_rng(1).random((16, 16))).writeto(tmp_path / "a" / "2.fits")
    nan = np.nan
    expected = {"a/0.npy": [1e-23, 1e-23, 2.0, nan], "a/1.fits": [nan, nan, nan, 1.25], "a/2.fits": [nan] * 4}
    same(values_of(tmp_path, "axion_mass", "v1", "v4", "THETA_E"), expected)
    columns = NpyDataset(tmp_path).columns(["axion_mass", "THETA_E"])
    assert [column.unit for column in columns.values()] == ["eV", "arcsec"]


def test_a_table_fills_what_pickled_files_leave_open(tmp_path):
    packed = np.empty(2, object)
    packed[:] = [np.random.default_rng(0).random((16, 16)), 1e-23]
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", packed, allow_pickle=True)
    write_images(tmp_path, ["a/1.npy"])
    (tmp_path / "parameters.csv").write_text("file,axion_mass\na/1.npy,3e-23\n")
    same(values_of(tmp_path, "axion_mass"), {"a/0.npy": [1e-23], "a/1.npy": [3e-23]})


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("file,z\na/0.npy,1\n", "no parameter mass of its images; there are z"),
        ("file,mass\nx.npy,1\n", "no row is of a file in its folder: it begins with x.npy, the folder with a/0.npy"),
        ("file,mass\n", "no row is of a file in its folder: it is empty"),
        ("file,mass\na/0.npy,\na/1.npy,abc\n", "mass of row 2 is 'abc', which is no number"),
        ("file,mass\na/0.npy,1\na/1.npy,unknown\n", "mass of row 2 is 'unknown', which is no number"),
        ('file;mass\na/0.npy;"0,5"\na/1.npy;NULL\n', "mass of row 1 is '0,5', which is no number"),
        ("file,mass\na/0.npy,1\na/1.npy,2\na/1.npy,3\n", "several rows of a/1.npy, of which only one can be right"),
        ("", "is empty"),
        ("file,mass\na,1,2,3\n", "is damaged, or no table"),
        (None, "no parameter mass of its images; no parameters.fits or parameters.csv has columns of numbers"),
    ],
)
def test_a_table_that_does_not_serve_is_one_line(table, fault, tmp_path):
    write_images(tmp_path, ["a/0.npy", "a/1.npy"])
    if table is not None:
        (tmp_path / "parameters.csv").write_text(table)
    with pytest.raises(InputError) as error:
        NpyDataset(tmp_path).columns(["mass"])
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


# What a network sees


def parameter(scale="linear", **changes):
    given = {"name": "p", "unit": "", "low": 0.0, "high": 1.0, "mean": 0.5, "deviation": 0.25, "period": 0.0}
    return Parameter(**given | {"scale": scale, "classes": ("a",)} | changes)


def test_phases_are_half_the_deviations_from_the_mean_and_angles_go_once_round():
    linear, logarithmic = parameter(), parameter("log10", mean=-23.0, deviation=0.5)
    angle = parameter("angle", mean=0.0, deviation=1.0, period=180.0)
    np.testing.assert_allclose(linear.phase(np.array([0.5, 1.0, np.nan])), [0, 1, np.nan])
    np.testing.assert_allclose(logarithmic.phase(np.array([1e-23, 1e-22, 1e-24])), [0, 1, -1], atol=1e-12)
    assert np.isnan(logarithmic.phase(np.array([0.0, -1.0]))).all()  # unknown: no network sees infinities
    np.testing.assert_allclose(angle.phase(np.array([0.0, 90.0, 180.0])), [0, np.pi, 2 * np.pi])
    random = np.random.default_rng(0).uniform(0.01, 0.99, 100)
    for of, values in ((linear, random), (logarithmic, 10 ** (random - 23)), (angle, 180 * random)):
        np.testing.assert_allclose(of.value(of.phase(values)), values, rtol=1e-9)
    np.testing.assert_allclose(angle.value(angle.phase(np.array([190.0]))), [10.0])


def test_scale_and_range_are_found_or_named():
    columns = {
        "x": Column(np.array([-1.0, 1.0, np.nan]), "arcsec"),
        "mass": Column(np.array([1e6, 1e10, 1e8])),
        "angle": Column(np.array([0.1, 3.0, 6.0]), "rad"),
        "direction": Column(np.array([10.0, 20.0, 350.0]), "Degree"),
    }
    names = ("x", "mass", "angle", " direction : angle/2 ", "mass:linear")
    found = fit(names, columns, ["a", "b", "b"])
    assert [of.scale for of in found] == ["linear", "log10", "angle", "angle", "linear"]
    np.testing.assert_allclose([of.period for of in found], [0, 0, 2 * np.pi, 180, 0])
    assert (found[0].low, found[0].high, found[0].mean, found[0].deviation) == (-1, 1, 0, 1)
    np.testing.assert_allclose((found[1].mean, found[1].deviation), (8, np.std([6, 10, 8])))
    assert (found[0].classes, found[1].classes) == (("a", "b"), ("a", "b"))
    assert fit(["x"], {"x": Column(np.array([np.nan, 1, 2]))}, ["a", "b", "b"])[0].classes == ("b",)


def test_the_same_mass_has_the_same_phase_whichever_subhalo_has_it():
    """The heaviest one and the next are drawn alike, so the network could not know which of two masses is meant."""
    random = np.random.default_rng(0)
    masses = np.sort(10 ** random.uniform(8, 10, (2, 500)), 0)
    columns = {"halo_mass_1": Column(masses[1], "solMass"), "halo_mass_2": Column(masses[0], "solMass")}
    columns |= {f"halo_x_{i}": Column(random.normal(i, i, 500), "arcsec") for i in (1, 2)}
    columns |= {f"gamma_{i}": Column(random.normal(i, i, 500)) for i in (1, 2)}  # the lens's: not two objects of a kind
    columns["halo_mass_1"].values[:5] = np.nan
    found = fit(tuple(columns), columns, ["a"] * 500)
    known = np.log10(np.concatenate([masses[1][5:], masses[0]]))
    for of in found[:2]:
        assert of.scale == "log10"
        assert (of.mean, of.deviation) == pytest.approx((known.mean(), known.std()))
    assert found[0].low > found[1].low  # each one warns by its own range
    assert found[2].phase(1.5) == found[3].phase(1.5)
    assert found[4].phase(1.5) != found[5].phase(1.5)
    assert found[5].mean == pytest.approx(columns["gamma_2"].values.mean())
    exchanged = {name: Column(*columns[name.translate({49: 50, 50: 49})]) for name in columns}
    there, back = (phases(found, {name: of.values for name, of in some.items()}) for some in (columns, exchanged))
    np.testing.assert_allclose(there[:, [0, 2]], back[:, [1, 3]], rtol=1e-6)


def test_objects_whose_units_or_scales_differ_are_apart():
    values = {"halo_mass_1": [1.0, 100.0], "halo_mass_2": [2.0, 50.0], "halo_mass_3": [3.0, 4.0]}
    columns = {name: Column(np.array(of), "kg" if name.endswith("3") else "") for name, of in values.items()}
    one, two, three = fit(("halo_mass_1:linear", "halo_mass_2", "halo_mass_3"), columns, ["a", "a"])
    assert [of.scale for of in (one, two, three)] == ["linear", "linear", "linear"]
    assert (one.mean, two.mean, three.mean) == (50.5, 26, 3.5)
    columns["halo_mass_2"].values[0] = 0
    with pytest.raises(InputError, match="parameter halo_mass_2: has a value of 0, which has no logarithm"):
        fit(("halo_mass_1:log10", "halo_mass_2:log10"), columns, ["a", "a"])


@pytest.mark.parametrize(
    ("specification", "values", "fault"),
    [
        ("p:log10", [1.0, 0.0], "has a value of 0, which has no logarithm"),
        ("p", [np.nan, np.nan], "no training image has it"),
        ("p", [2.0, 2.0], "is 2 in every training image"),
        ("p:log", [1.0, 2.0], "a scale is linear, log10, angle or, say, angle/2"),
        ("p:angle/0", [1.0, 2.0], "a scale is"),
        (":log10", [1.0, 2.0], "a scale is"),
        ("p:angle", [10.0, 300.0], "up to 300 without a unit of angles"),
        ("p:linear", [1e300, -1e300], "are too large"),
    ],
)
def test_parameters_that_cannot_be_are_one_line(specification, values, fault):
    with pytest.raises(InputError, match=fault):
        fit([specification], {"p": Column(np.array(values))}, ["a", "a"])


def test_parameters_of_one_number_are_of_one_object_beside_the_lens_and_objects_of_a_kind_are_together():
    names = ("source_x", "halo_mass_1", "halo_x_1", "halo_r_1", "halo_mass_2", "halo_x_2", "mass_total", "v1")
    found = objects([parameter(name=name) for name in names])
    assert found == [[[6, 0, 7]], [[1, 3, 2, 6, 0, 7]], [[4, 5, 6, 0, 7]]]
    assert objects([parameter(name=name) for name in names], beside_lens=False) == [[[6, 0, 7]], [[1, 3, 2]], [[4, 5]]]
    names = ("halo_mass_1", "halo_x_1", "halo_x_2", "halo_mass_2")
    assert objects([parameter(name=name) for name in names]) == [[[0, 1], [3, 2]]]


def test_numbers_without_a_mass_have_a_meaning_of_their_own():
    """gamma_1 and gamma_2 are not two objects of a kind, which could change places."""
    names = ("gamma_1", "gamma_2", "halo_mass_1", "halo_mass_2", "centre_0", "centre_1")
    assert objects([parameter(name=name) for name in names]) == [[[4, 5, 0, 1]], [[2, 4, 5, 0, 1], [3, 4, 5, 0, 1]]]
    assert objects([parameter(name=name) for name in ("mass_1", "x_1", "mass_2", "x_2")]) == [[[0, 1], [2, 3]]]


def test_parameters_travel_as_plain_values():
    found = [parameter(), parameter("angle", name="q", period=6.28, unit="rad")]
    assert from_plain(as_plain(found)) == found
    plain = as_plain(found)
    for change in ({"deviation": 0.0}, {"mean": float("nan")}, {"scale": "cubic"}, {"period": 1.0}, {"name": "q"}):
        with pytest.raises(ValueError, match="parameter"):
            from_plain([plain[0] | change, plain[1]])


# What is asked for


KNOWN = [
    parameter(name="x", unit="arcsec", low=-1.0),
    parameter("log10", name="mass", unit="eV", low=1e-24, high=1e-22, mean=-23.0),
    parameter("angle", name="angle", unit="rad", high=6.3, period=6.28),
]


def test_what_is_asked_for_is_a_number_or_one_for_each_image():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = asked(KNOWN, {"x": 0.5, "mass": [1e-23, 1e-22], "angle": 6.5 - 4 * np.pi}, 2, "a")
        assert asked(KNOWN, {"x": 1.0001}, 1, "a")["x"].tolist() == [1.0001]  # just outside the range, as by chance
    np.testing.assert_allclose([*found.values()], [[0.5, 0.5], [1e-23, 1e-22], [6.5 - 4 * np.pi] * 2])
    assert np.isnan([*asked(KNOWN, None, 3, "a").values()]).all()
    assert phases(KNOWN, found).shape == (2, 3)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"z": 1}, "no parameter 'z': x, -1 to 1 arcsec; mass, 1e-24 to 1e-22 eV; angle, 0 to 6.3 rad"),
        ({"x": [1, 2, 3]}, "parameter x: neither a number nor 2 of them"),
        ({"x": "large"}, "parameter x: neither a number"),
        ({"x": float("inf")}, "parameter x: inf cannot be; it is x, -1 to 1 arcsec"),
        ({"mass": [np.nan, -1e-23]}, "parameter mass: -1e-23 cannot be"),
        ({"x": 1e300}, "parameter x: 1e+300 cannot be"),
        ({"x": 10**400}, "parameter x: neither a number"),
        ({"x": 1j}, "parameter x: neither a number"),
        ({"x": [1j, 0]}, "parameter x: neither a number"),
        ({"x": 3 * units.s}, "parameter x: neither a number"),
        (3, "parameters 3: values by name"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line_with_names_and_units(given, fault):
    with pytest.raises(InputError) as error:
        asked(KNOWN, given, 2, "a")
    assert fault in str(error.value)
    with pytest.raises(InputError, match="it was trained without any"):
        asked([], {"x": 1}, 1, "a")


def test_what_is_asked_for_may_have_units_or_be_masked_and_large(recwarn):
    assert asked(KNOWN, {"x": 500 * units.mas}, 1, "a")["x"] == [0.5]
    masked = np.ma.masked_array([0.5, 0.9], [False, True])
    np.testing.assert_equal(asked(KNOWN, {"x": masked}, 2, "a")["x"], [0.5, np.nan])
    heavy = parameter("log10", name="m", unit="kg", low=1e41, high=1e43, mean=42.0)
    assert asked([heavy], {"m": 1e42}, 1, "a")["m"] == [1e42]
    for nothing in (None, [None, np.nan]):
        assert np.isnan(asked(KNOWN, {"x": nothing}, 2, "a")["x"]).all()
    assert not recwarn


@pytest.mark.parametrize(
    ("given", "name", "warning"),
    [
        ({"x": [0.0, 1.5]}, "a", "1.5 is outside what this was trained on: x, -1 to 1 arcsec"),
        ({"mass": 1e-20}, "a", "1e-20 is outside what this was trained on: mass, 1e-24 to 1e-22 eV"),
        ({"angle": [1.0, 90.0]}, "a", "90 is outside what this was trained on: angle, 0 to 6.3 rad"),
        ({"angle": -7.0}, "a", "-7 is outside"),
        ({"x": 0.0}, "b", "x: no image of b that this was trained on has it"),
    ],
)
def test_what_training_did_not_see_is_a_warning(given, name, warning):
    with pytest.warns(UserWarning, match=warning):
        asked(KNOWN, given, 2, name)


def test_a_folder_in_other_units_is_a_warning(tmp_path):
    write_images(tmp_path, [f"a/{i}.npy" for i in range(40)])

    def warned(x, mass, angle):
        rows = [f"a/{i}.npy,{x(i / 40)},{mass(i / 40)},{angle(i / 40)}" for i in range(40)]
        (tmp_path / "parameters.csv").write_text("\n".join(["file,x,mass,angle", *rows]))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            NpyDataset(tmp_path).phases(KNOWN)
        return [str(of.message).removeprefix(f"{tmp_path}: ") for of in found]

    def mass(u):
        return 10 ** (-24 + 2 * u)

    assert warned(lambda u: 2 * u - 1, mass, lambda u: 6 * u) == []
    assert warned(lambda u: "" if u else 5, mass, lambda u: 6 * u)[0].startswith(
        "100% of its values are outside what is"
    )
    assert warned(lambda u: 2 * u - 1 + 3 * (u == 0), mass, lambda u: "") == []  # only one value of 40 is outside
    found = warned(lambda u: 1000 * (2 * u - 1), lambda u: -24 + 2 * u, lambda u: 359 * u)
    ends = ["98% of its values are outside what is known of x, -1 to 1 arcsec"]
    ends += ["100% of its values are outside what is known of mass, 1e-24 to 1e-22 eV"]
    assert found == [*ends, "98% of its values are outside what is known of angle, 0 to 6.3 rad"]
