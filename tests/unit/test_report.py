"""The page of the report: any part may be missing, words are explained, and a shared copy has no real image."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lesiongen.data import images
from lesiongen.evaluation import plots
from lesiongen.evaluation.report import NearestPair, page, words
from lesiongen.evaluation.report.readings import why_missing
from tests import evaluations

VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Reads a page: open tags, faults, text, and what each rule needs."""

    def __init__(self, html: str):
        super().__init__()
        self.stack, self.faults, self.tags, self.text, self.headings, self.ids = [], [], [], [], [], []
        self.feed(html)
        self.close()
        self.faults += [f"{tag} is not closed" for tag in self.stack]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text.append((data, "dfn" in self.stack))

    def all(self, tag: str) -> list[dict]:
        """Returns the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def shown():
    return evaluations.shown()


@pytest.fixture(scope="module")
def whole(shown) -> str:
    return page("ham10000", evaluations.complete(), *shown)


def missing_parts() -> dict[str, dict]:
    """Returns complete metrics without one part each: None, and a reason, and the parts within privacy."""
    found = {}
    for key in evaluations.complete():
        for how, part in (("None", None), ("reason", {"reason": "there was no time"})):
            found[f"{key}-{how}"] = evaluations.complete() | {key: part}
    for key in ("copies", "membership", "extraction"):
        metrics = evaluations.complete()
        metrics["privacy"][key] = {"reason": "there was no time"}
        found[f"privacy.{key}"] = metrics
    found["everything"] = {}
    found["rulers"] = evaluations.complete() | {"likeness": {"number": 9, "mix": {}, "rulers": {}}}
    one = evaluations.complete()
    del one["likeness"]["rulers"]["imagenet"], one["likeness"]["rulers"]["lesions"]["all"]["prior"]
    return found | {"one-ruler": one}


def without_numbers(part):
    """Returns metrics in which every figure is None, as where no interval and no value could be computed."""
    if isinstance(part, dict):
        if set(part) >= {"value", "low", "high"}:
            return part | {"value": None, "low": None, "high": None}
        return {key: without_numbers(item) for key, item in part.items()}
    return part


def check_structure(html: str) -> None:
    read = Reader(html)
    assert read.faults == []
    assert all(attributes.get("alt") for attributes in read.all("img"))
    assert len(read.all("caption")) == len(read.all("table"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in read.all("th"))
    assert read.headings[0] == 1 and read.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(read.headings, read.headings[1:], strict=False))
    assert len(read.ids) == len(set(read.ids))
    assert {a["href"].removeprefix("#") for a in read.all("a")} <= set(read.ids)
    assert read.all("html")[0]["lang"] == "en"
    assert not re.search(r"(src|href)=.(https?:|//)|<script|url\(|@import", html)


def test_the_page_is_well_formed(whole):
    check_structure(whole)


@pytest.mark.parametrize("name", missing_parts())
def test_any_part_may_be_missing(name):
    metrics = missing_parts()[name]
    html = page("x", metrics, {}, {"": (None, None)})
    check_structure(html)
    assert ("no time" in html) == (("reason" in name or "privacy." in name) and not name.startswith("schema"))
    assert "None" not in "".join(text for text, _ in Reader(html).text)


def test_figures_without_values_are_not_measured(shown):
    metrics = without_numbers(evaluations.complete())
    metrics["tokenizer"] |= {"psnr": None, "perplexity/top": None}
    metrics["priors"]["top"]["bits_per_token"] = None
    for kind in metrics["privacy"]["copies"]["kinds"].values():
        kind |= {"median": None, "least": None, "held_out_least": None}
    html = page("x", metrics, *shown)
    check_structure(html)
    assert not re.search(r"\b(nan|None|inf)\b", " ".join(text for text, _ in Reader(html).text))


def test_every_section_stands_in_its_place(whole):
    order = ["verdict", "samples", "likeness", "utility", "privacy", "gate", "fairness", "models", "data", "made"]
    found = re.findall(r'<section id="([a-z]+)"', whole)
    assert found == order


def test_terms_are_explained_where_they_first_stand(whole):
    read = Reader(whole)
    for term in ("95 % interval", "KID", "Fréchet distance", "AUPRC", "AUC", "TPR at 1 % FPR", "PSNR", "SSIM", "NMSE", "ITA"):
        pattern = re.compile(rf"\b{re.escape(term)}\b", re.IGNORECASE)
        first = next((defined for text, defined in read.text if pattern.search(text.replace("\u00a0", " "))), None)
        assert first is not None, f"{term} is not on the page"
        assert first, f"{term} stands before its explanation"


def test_diagnoses_are_spelled_out(whole):
    assert "melanoma (mel)" in whole
    assert "actinic keratosis / intraepithelial carcinoma (akiec)" in whole
    assert words.diagnosis("MEL") == "melanoma (MEL)"
    assert words.diagnosis("lentigo of Anna") == "lentigo of Anna"


def embedded(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', html)]


def test_a_shared_copy_shows_no_real_image():
    """Real images are pure green and samples pure red, so that a green picture gives a real image away."""
    metrics, (pictures, _, _) = evaluations.complete(), evaluations.shown()
    green, red = (torch.zeros(3, 40, 320, dtype=torch.uint8) for _ in range(2))
    green[1], red[0] = 255, 255
    pictures = pictures | dict.fromkeys(("reconstructions", "neighbours", "codes"), images.encode_png(green))
    pairs = [NearestPair(red[..., :40], green[..., :40], {"pixels": 0.01})]
    strips = {"mel": (red, green)}

    def greenish(html: str) -> int:
        colours = [Image.open(io.BytesIO(data)).convert("RGB").resize((1, 1)).getpixel((0, 0)) for data in embedded(html)]
        return sum(g > 200 and r < 60 and b < 60 for r, g, b in colours)

    private, shared = (page("x", metrics, pictures, strips, pairs, share=share) for share in (False, True))
    assert greenish(private) == 4  # both halves of the strip, the pair, the reconstructions
    assert greenish(shared) == 0
    assert "Real (training images)" not in shared and "Pair 1" not in shared
    assert "shows no real image" in shared
    check_structure(shared)


def test_hostile_names_stay_text(shown):
    evil = "<script>alert('x')</script>\"{0}&"
    metrics = evaluations.complete()
    metrics["made"] |= {"name": evil, "command": evil, "config": {evil: evil}, "digests": {evil: evil}}
    metrics["data"]["sources"] = metrics["data"]["attributions"] = metrics["data"]["licences"] = {evil: 3}
    for split in metrics["data"]["counts"].values():
        split[evil] = 1
    metrics["classifier"]["recall"][evil] = metrics["classifier"]["recall"]["mel"]
    metrics["fairness"]["slices"]["site"][evil] = metrics["fairness"]["slices"]["site"]["back"]
    metrics["likeness"]["rulers"][evil] = metrics["likeness"]["rulers"]["lesions"]
    metrics["gate"]["reasons"][evil] = 2
    html = page(evil, metrics, shown[0], {evil: shown[1]["mel"]}, shown[2])
    check_structure(html)
    assert html.count("&lt;script&gt;") > 8


def test_the_page_can_be_sent(whole):
    assert len(whole) < 5e6


def test_a_reason_is_a_sentence_not_a_part():
    assert why_missing({"reason": None, "value": 1}) is None
    assert why_missing({"reason": "too few"}) == "too few"
    assert why_missing(None) and why_missing({})


def test_classes_share_the_panel_of_their_level():
    plain = [{"samples": n, "train/usage/top": 0.5, "val/usage/top": 0.6, "val/perplexity/top": 9.0} for n in (1, 2)]
    parted = [row | {f"val/{what}/top/{c}": 0.3 for what in ("usage", "perplexity") for c in ("mel", "nv")} for row in plain]
    sizes = [Image.open(io.BytesIO(plots.curves({"tokenizer": rows}))).size for rows in (plain, parted)]
    assert sizes[0] == sizes[1]


def test_there_are_no_curves_of_nothing():
    assert plots.curves({"tokenizer": [{"samples": 1, "system/cpu": 3.0}]}) is None
