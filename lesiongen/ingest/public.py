"""Public data sets of skin lesions that `lesiongen download` knows: addresses, licences and published checksums of files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        name: File name, under which it is also stored.
        urls: Addresses of the same file. The first that has the file is used.
        bytes: Published size; None where no size is published.
        checksum: Published checksum, as "md5:…" or "sha256:…"; None where no checksum is published.
    """

    name: str
    urls: tuple[str, ...]
    bytes: int | None = None
    checksum: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set: its files and its licence, a text with citations that is printed and written to LICENCE.txt."""

    licence: str
    files: tuple[File, ...]


def _isic(year: int, name: str, checksum: str | None = None) -> File:
    """Returns a file of an ISIC challenge, which two hosts offer."""
    hosts = ("isic-challenge-data.s3.amazonaws.com", "isic-archive.s3.amazonaws.com/challenges")
    return File(name, tuple(f"https://{host}/{year}/{name}" for host in hosts), checksum=checksum)


def _dataverse(name: str, number: str, size: int, md5: str) -> File:
    """Returns a file of Harvard Dataverse. number: its id there, with the query that the download needs."""
    return File(name, (f"https://dataverse.harvard.edu/api/access/datafile/{number}",), size, f"md5:{md5}")


CITE_HAM = """\
Tschandl P, Rosendahl C, Kittler H. The HAM10000 dataset, a large collection of multi-source dermatoscopic images of
common pigmented skin lesions. Sci. Data 5, 180161 (2018). doi:10.1038/sdata.2018.161
"""
NON_COMMERCIAL = """\
CC-BY-NC 4.0: you may share and change the images with attribution, for non-commercial purposes only. The same holds for
what is made from them.
https://creativecommons.org/licenses/by-nc/4.0/

Cite:
"""
SETS = {
    "isic-2016": DataSet(
        """\
ISIC 2016 challenge, task 3 (International Skin Imaging Collaboration): 900 training images, 379 test images.
CC-0: no conditions. https://creativecommons.org/publicdomain/zero/1.0/

Cite:
Gutman D, Codella N C F, Celebi E, Helba B, Marchetti M, Mishra N, Halpern A. Skin Lesion Analysis toward Melanoma
Detection: A Challenge at the International Symposium on Biomedical Imaging (ISBI) 2016. arXiv:1605.01397
""",
        (
            _isic(
                2016,
                "ISBI2016_ISIC_Part3_Training_GroundTruth.csv",
                "sha256:0ffadd63b7cec650cddfbe5df54d1d3167453fe6004c2bbf05824184b0c4d405",
            ),
            _isic(2016, "ISBI2016_ISIC_Part3_Test_GroundTruth.csv"),
            _isic(
                2016,
                "ISBI2016_ISIC_Part3_Training_Data.zip",
                "sha256:d78bd1de08511b514e58784c91fd2d8dab24e407cafd023a7debbceb9155ffb2",
            ),
            _isic(2016, "ISBI2016_ISIC_Part3_Test_Data.zip"),
        ),
    ),
    "isic-2018": DataSet(
        f"""\
ISIC 2018 challenge, task 3 (International Skin Imaging Collaboration): HAM10000 (10,015 training images),
193 validation images, 1,512 test images.
{NON_COMMERCIAL}\
Codella N, Rotemberg V, Tschandl P, Celebi M E, Dusza S, Gutman D, Helba B, Kalloo A, Liopyris K, Marchetti M, Kittler H,
Halpern A. Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the International Skin Imaging
Collaboration (ISIC). arXiv:1902.03368
{CITE_HAM}""",
        (
            _isic(2018, "ISIC2018_Task3_Training_LesionGroupings.csv"),
            _isic(2018, "ISIC2018_Task3_Training_GroundTruth.zip"),
            _isic(2018, "ISIC2018_Task3_Validation_GroundTruth.zip"),
            _isic(2018, "ISIC2018_Task3_Test_GroundTruth.zip"),
            _isic(2018, "ISIC2018_Task3_Validation_Input.zip"),
            _isic(2018, "ISIC2018_Task3_Test_Input.zip"),
            _isic(2018, "ISIC2018_Task3_Training_Input.zip"),
        ),
    ),
    "ham10000": DataSet(
        f"""\
HAM10000 (ViDIR Group, Department of Dermatology, Medical University of Vienna): 10,015 images of 7,470 lesions.
https://doi.org/10.7910/DVN/DBW86T
{NON_COMMERCIAL}{CITE_HAM}""",
        (
            # Without format=original the host sends a converted table, which does not have the published checksum.
            _dataverse("HAM10000_metadata.csv", "4338392?format=original", 690_218, "8f85fb1aa29d80a2797247e434deb79d"),
            _dataverse("HAM10000_images_part_1.zip", "3172585", 1_366_522_108, "4639bfa73ab251610530a97c898e6e46"),
            _dataverse("HAM10000_images_part_2.zip", "3172584", 1_403_566_547, "da43d6cc50f6613013be07e8986b384b"),
        ),
    ),
}
