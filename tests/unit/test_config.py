"""Configs: mistakes are named, a saved config loads again, a stage's identity has only the fields that change its result."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hpc import config as c
from hpc.data.storage import CacheConfig, Store
from hpc.errors import UserError
from launch.__main__ import parse_arguments
from lesiongen import experiment
from lesiongen.priors.gated_pixelcnn import GatedPixelCNNConfig

CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.modle.hidden=3", "did you mean 'model'"),
        ("tokenizer.model.hiden=3", "Unknown key 'tokenizer.model.hiden' in the config; did you mean 'hidden'"),
        ("data.size=big", "'data.size' is 'big', which is not a whole number"),
        ("data.size=4", "size must be at least 16"),
        ("data.size=68", "do not divide by the strides"),
        ("data.val=1.5", "must leave something to train on"),
        ("tokenizer.train.engine.zero=5", "choose one of 0, 1, 2, 3"),
        ("tokenizer.train.batch=33 local.ranks=2", "33 does not divide among 2 ranks"),
        ("priors.middle.train.samples=3", "this tokenizer has the levels top, bottom"),
        ("sample.levels.middle.top_k=3", "sample.levels.middle: this tokenizer has the levels top, bottom"),
        ("priors.top.facts=[label,colour]", "unknown fact 'colour'; choose among label, site, sex, age_band"),
        ("priors.top.train.patience=-1", "patience is a number of samples"),
        ("priors.top.model.kind=lstm", "choose one of gpt, pixelcnn, gated_pixelcnn, pixelsnail"),
        ("priors.top.model.width=100", "must be a multiple of 4 × heads"),
        ("data", "is not an override"),
        ("data.size.deep=1", "holds a value, not a section"),
        ("tokenizer.train.optim.lr=true", "is not a number"),
        ("inputs.codes=other", "inputs.codes needs inputs.tokenizer"),
        ("data.images=null", "there are no images"),
        ("tokenizer.model.strides=[4,3]", "powers of two"),
        ("name=a/b", "directory's name"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=r".") as error:
        experiment.load(str(CONFIGS[0]), override.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_read_back(path):
    """Each config also begins with comments on what it trains, the command, the hardware, and the expected result."""
    made = experiment.load(str(path))
    assert c.from_plain(experiment.Experiment, c.parse_yaml(c.to_yaml(made), "")) == made
    header = path.read_text().split("name:")[0]
    assert all(word in header for word in ("# What:", "# Command:", "# Hardware:", "# Expect:"))


def test_another_kind_replaces_the_settings_of_the_kind_before():
    path, given = "configs/ham10000-cpu.yaml", ["data.images=x"]
    kinds = [f"priors.codes.model.kind={kind}" for kind in ("gpt", "gated_pixelcnn")]
    assert experiment.load(path, [*given, kinds[0]]).prior("codes").model.width == 256
    other = experiment.load(path, [*given, kinds[1], "priors.codes.model.width=48"]).prior("codes").model
    assert (other.kind, other.width, other.layers) == ("gated_pixelcnn", 48, GatedPixelCNNConfig().layers)
    with pytest.raises(UserError, match=r"priors\.codes: this tokenizer has the levels top, bottom"):
        experiment.load(path, [*given, "tokenizer.model.kind=vqvae2"])


def test_numbers_people_write(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {images: here}\ntokenizer: {train: {samples: 80_000, optim: {lr: 3e-4}}}\n")
    made = experiment.load(str(tmp_path / "x.yaml"), ["seed=1e3"])
    assert (made.name, made.tokenizer.train.samples, made.tokenizer.train.optim.lr, made.seed) == ("x", 80000, 3e-4, 1000)


def test_a_field_that_was_added_leaves_the_fingerprint_alone_until_it_is_used():
    @dataclass(frozen=True)
    class Before:
        sigma: float = 1.0

    @dataclass(frozen=True)
    class After(Before):
        cutout: float = c.added(0.0)

    assert c.to_plain(After(), volatile=False) == c.to_plain(Before(), volatile=False)
    assert c.to_plain(After(cutout=0.5), volatile=False) == {"sigma": 1.0, "cutout": 0.5}
    assert c.to_plain(After()) == {"sigma": 1.0, "cutout": 0.0}


def test_length_and_place_leave_the_fingerprint_alone():
    one = experiment.load(str(CONFIGS[0]))
    longer = replace(one.tokenizer, train=replace(one.tokenizer.train, samples=10**9, log_every=7))
    assert c.to_plain(longer, volatile=False) == c.to_plain(one.tokenizer, volatile=False)
    wider = replace(one.tokenizer, train=replace(one.tokenizer.train, batch=64))
    assert c.differences(c.to_plain(one.tokenizer), c.to_plain(wider)) == ["train.batch: 32 → 64"]


def test_unreadable_configs(tmp_path):
    for content, message in (("a: [", "not valid YAML"), ("- 1", "must hold keys"), (None, "cannot be read")):
        path = tmp_path / "x.yaml"
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            experiment.load(str(path))


def test_home_and_variables_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "x.yaml").write_text(
        "data: {images: ~/photos, metadata: $SCRATCH/m.csv, splits: '${SCRATCH}/s.csv'}\nruns: ~/runs\n"
    )
    more = ["inputs.shards=[~/a, 's3://b/$c?x=~']", "inputs.tokenizer=$SCRATCH/t", "tokenizer.loss.lpips_weights=~/w"]
    made = experiment.load(str(tmp_path / "x.yaml"), [*more, "inputs.codes=~/c", "data.cache.directory=$SCRATCH/cache"])
    assert (made.data.images, made.data.metadata, made.data.splits) == ("/home/me/photos", "/scratch/m.csv", "/scratch/s.csv")
    assert (made.runs, made.inputs.shards) == ("/home/me/runs", ("/home/me/a", "s3://b/$c?x=~"))
    assert (made.inputs.tokenizer, made.inputs.codes) == ("/scratch/t", "/home/me/c")
    assert made.tokenizer.loss.lpips_weights == "/home/me/w"
    assert made.data.cache.directory == "$SCRATCH/cache", "a compute node may have another $SCRATCH than the login node"
    assert c.from_plain(experiment.Experiment, c.parse_yaml(c.to_yaml(made), "")) == made
    options = parse_arguments(["sample", "~/x.yaml", "--out", "$SCRATCH/o"])
    assert (options.config, options.out) == ("/home/me/x.yaml", "/scratch/o")


@pytest.mark.parametrize("path", ["$NOT_SET/x", "${NOT_SET}", "~no-such-user/x"])
def test_a_path_with_an_unset_variable_is_refused(tmp_path, monkeypatch, capsys, path):
    monkeypatch.delenv("NOT_SET", raising=False)
    name = "no-such-user" if "~" in path else "NOT_SET"
    (tmp_path / "x.yaml").write_text("data: {images: here}\n")
    for key in ("data.images", "data.metadata", "data.splits", "runs", "inputs.shards", "inputs.tokenizer"):
        with pytest.raises(UserError, match=rf"{key}.* is .*, but .*{name}.* is not known here"):
            experiment.load(str(tmp_path / "x.yaml"), [f"{key}={path}"])
    with pytest.raises(UserError, match=f"data.cache.directory is .*{name}"):
        Store(tmp_path, CacheConfig(path))
    with pytest.raises(UserError, match=r"data\.images is"):
        experiment.load(str(tmp_path / "x.yaml"), ["preset=auto", f"data.images={path}"])
    with pytest.raises(SystemExit):
        parse_arguments(["verify", path])
    assert name in capsys.readouterr().err


def test_a_folder_whose_name_looks_like_a_variable(tmp_path):
    (tmp_path / "a$b").mkdir()
    assert c.expand_path(f"{tmp_path}/a$b") == f"{tmp_path}/a$b"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-16-le"])
def test_configs_in_other_encodings(tmp_path, encoding):
    """What editors save: with a byte-order mark the config is read; without one only UTF-8 can be, and the message names it."""
    (tmp_path / "x.yaml").write_bytes("data: {images: Läsionen}\n".encode(encoding))
    if encoding in ("latin-1", "utf-16-le"):
        with pytest.raises(UserError, match=r"x.yaml is not text in UTF-8 .* Save it as UTF-8\.$"):
            experiment.load(str(tmp_path / "x.yaml"))
    else:
        assert experiment.load(str(tmp_path / "x.yaml")).data.images == "Läsionen"


def test_a_path_that_is_no_text_survives_the_resolved_config(tmp_path):
    """A folder's name may be bytes that are no UTF-8; Python then holds them as surrogates."""
    (tmp_path / "x.yaml").write_text("data: {images: here}\n")
    made = experiment.load(str(tmp_path / "x.yaml"))
    made = replace(made, data=replace(made.data, images="photos-\udce9"))
    (tmp_path / "y.yaml").write_bytes(c.to_yaml(made).encode())
    assert experiment.load(str(tmp_path / "y.yaml")).data.images == "photos-\udce9"
