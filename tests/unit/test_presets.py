"""Presets: which one is chosen, lengths in epochs, what the user's own settings keep, and that a plan fits a common GPU."""

import pytest

from hpc.errors import UserError
from launch.__main__ import main
from launch.cluster import ClusterConfig, Resources
from lesiongen import experiment, presets
from lesiongen.priors.gated_pixelcnn import GatedPixelCNNConfig


@pytest.fixture
def photographs(tmp_path):
    """photographs(number) returns a config of two lines for a folder of that many (empty) image files."""

    def make(number: int, more: str = "", preset: str = "auto"):
        folder = tmp_path / "photos"
        folder.mkdir()
        for i in range(number):
            (folder / f"{i}.jpg").touch()
        config = tmp_path / "mine.yaml"
        config.write_text(f"data: {{images: {folder}}}\npreset: {preset}\n{more}")
        return str(config)

    return make


@pytest.mark.parametrize(("images", "expected"), [(1, "small"), (15_000, "small"), (15_001, "base"), (800_000, "large")])
def test_auto_goes_by_the_number_of_training_images_on_gpus(monkeypatch, images, expected):
    monkeypatch.setattr(presets, "count_images", lambda folder: round(images / 0.8))
    chosen = presets.fill_in({"preset": "auto", "data": {"images": "x"}}, on_gpu=True)
    assert chosen["priors"] == presets.settings(expected, round(round(images / 0.8) * 0.8))["priors"]


def test_auto_goes_by_the_machine(photographs, monkeypatch):
    """The cluster file decides, else the config's local.device and `hardware`, else whether this machine has a GPU."""
    config, width = photographs(400), {"cpu": 256, "small": 512}

    def chosen(*overrides, **machine):
        return experiment.load(config, overrides, **machine).prior("codes").model.width

    monkeypatch.setattr(presets.hardware, "has_gpu", lambda: False)
    assert chosen() == chosen(on_gpu=False) == width["cpu"]
    assert chosen("hardware={gpus: 1, gpu: L4}") == chosen(on_gpu=True) == width["small"]
    monkeypatch.setattr(presets.hardware, "has_gpu", lambda: True)
    assert chosen() == width["small"]
    assert chosen("local.device=cpu", "hardware={gpus: 1, gpu: L4}") == width["cpu"]


def test_gpus_of_a_cluster_file_are_seen_however_they_are_requested():
    for request in ({"gpus_per_node": 2}, {"extra": {"gres": "gpu:a100:4"}}, {"extra": {"gpus-per-task": 1}}):
        assert ClusterConfig(stages={"prior": request}).has_gpus
    assert ClusterConfig(extra={"gpus": 1}).has_gpus and ClusterConfig(default=Resources(gpus_per_node=1)).has_gpus
    assert not ClusterConfig(extra={"gres": "lustre:1"}, stages={"prior": {"nodes": 2, "extra": {"gpus": None}}}).has_gpus


@pytest.mark.parametrize("bf16", [True, False])
def test_on_a_cpu_trainings_are_short_and_in_the_precision_that_it_computes_fast(photographs, monkeypatch, bf16):
    monkeypatch.setattr(presets.hardware, "cpu_has_bf16", lambda: bf16)
    few = experiment.load(photographs(100), ["preset=cpu"])
    assert few.tokenizer.train.samples == few.polish.train.samples == 100 * 80
    assert few.prior("codes").train.samples == 200 * 80
    assert {train.engine.precision for _, train in few.trainings.values()} == {"bf16" if bf16 else "fp32"}
    recipe = experiment.load("configs/ham10000-cpu.yaml", ["data.images=x"])
    many = experiment.make(presets.settings("cpu", 50_000) | {"name": "x", "data": {"images": "x"}})
    lengths = [[train.samples for _, train in config.trainings.values()] for config in (many, recipe)]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("name", [name for name, preset in presets.PRESETS.items() if not preset.capped])
@pytest.mark.parametrize("images", [40, 4_000, 500_000])
def test_lengths_are_epochs_and_the_rest_is_in_proportion(name, images):
    config = experiment.make(presets.settings(name, images) | {"name": "x", "data": {"images": "x"}})
    preset = presets.PRESETS[name]
    lengths = {config.tokenizer.train: preset.tokenizer_epochs, config.polish.train: preset.polish_epochs}
    lengths |= {config.prior(level).train: preset.prior_epochs for level in config.levels}
    for train, epochs in lengths.items():
        assert train.samples == pytest.approx(epochs * images, abs=train.batch)
        assert train.samples % train.batch == train.log_every % train.batch == 0
        assert train.optim.warmup < 0.05 * train.samples + train.batch
        assert train.log_every <= train.eval_every <= train.samples


def test_two_lines_give_a_plan_that_fits(photographs, capsys):
    assert main(["plan", photographs(5_000), "hardware={gpus: 1, gpu: RTX 4090, host_gb: 64}"]) == 0
    text = capsys.readouterr().out
    assert "it fits" in text and "4,000 training images" in text
    epochs = {line.split()[0]: float(line.split()[2]) for line in text.splitlines() if "GB," in line}
    assert epochs == {"tokenizer": 100.0, "polish": 40.0, "prior-codes": 200.0}


def test_own_settings_go_before_those_of_a_preset(photographs):
    config = photographs(40, "tokenizer: {model: {hidden: 32}, train: {samples: 640}}\nencode: {draws: 3}\n", "small")
    found = experiment.load(config, ["priors.codes.model.layers=2", "tokenizer.train.batch=16"])
    assert (found.tokenizer.model.hidden, found.tokenizer.train.samples, found.encode.draws) == (32, 640, 3)
    assert (found.prior("codes").model.layers, found.tokenizer.train.batch) == (2, 16)
    assert found.prior("codes").model.width == 512 and found.tokenizer.model.entries == 1024
    assert found.tokenizer.train.engine.precision == "bf16"


def test_another_kind_of_prior_replaces_the_settings_of_the_preset(photographs):
    config = photographs(40, "priors: {codes: {model: {kind: gated_pixelcnn, layers: 2}}}\n", "small")
    model = experiment.load(config).prior("codes").model
    assert (model.kind, model.layers, model.width) == ("gated_pixelcnn", 2, GatedPixelCNNConfig().width)


def test_the_option_is_the_same_as_the_line(photographs, tmp_path, capsys):
    config = photographs(40, preset="small")
    assert main(["plan", config]) == 0
    expected = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("preset: small\n", ""))
    assert main(["plan", config, "--preset", "small"]) == 0
    numbers = lambda text: [line for line in text.splitlines() if "hours" not in line and "GB," not in line]  # noqa: E731
    assert numbers(capsys.readouterr().out) == numbers(expected)


def test_what_is_wrong_with_a_preset_is_said(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("data: {images: nowhere}\n")
    with pytest.raises(UserError, match="'huge' is not a preset; choose among cpu, small, base, large and auto"):
        experiment.load(str(config), ["preset=huge"])
    with pytest.raises(UserError, match=r"no images in data\.images=nowhere"):
        experiment.load(str(config), ["preset=auto"])


def test_the_warm_up_follows_samples_that_the_user_sets(photographs):
    """Otherwise a training that the user shortens would end within the warm-up of the long one."""
    config = photographs(400, "tokenizer: {train: {samples: 3200}}\n", "small")
    found = experiment.load(config, ["priors.codes.train.samples=6400"])
    for train, samples in ((found.tokenizer.train, 3_200), (found.prior("codes").train, 6_400)):
        assert train.samples == samples
        assert max(train.optim.warmup, train.log_every) <= 0.05 * samples + train.batch
        assert train.eval_every <= samples
    assert found.polish.train.samples == pytest.approx(40 * 320, abs=64)


def test_a_table_that_lists_fewer_images_than_the_folder_holds_decides(photographs, tmp_path):
    config = photographs(100, preset="small")
    (tmp_path / "meta.csv").write_text("image,dx\n" + "".join(f"{i},a\n" for i in range(50)))
    found = experiment.load(config, [f"data.metadata={tmp_path / 'meta.csv'}"])
    assert found.tokenizer.train.samples == pytest.approx(100 * 40, abs=64)
