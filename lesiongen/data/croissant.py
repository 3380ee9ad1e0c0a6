"""croissant.json beside samples: what the folder holds, in the format of MLCommons that catalogues of data sets read.

Croissant 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html.
"""

import csv
import hashlib
import io
import json

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "samplingRate": "cr:samplingRate",
    "equivalentProperty": "cr:equivalentProperty",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
NUMBERS = ("index", "seed", "top_k")  # columns of whole numbers


def croissant(name: str, licence: str, date: str, table: str) -> bytes:
    """Describes a folder of samples.

    Args:
        name: Name of the samples.
        licence: The strictest licence of the training images.
        date: The day of their making, YYYY-MM-DD.
        table: Content of metadata.csv.

    Returns:
        Content of croissant.json.
    """
    columns = next(csv.reader(io.StringIO(table)))
    csv_file = {
        "@type": "cr:FileObject",
        "@id": "metadata.csv",
        "name": "metadata.csv",
        "contentUrl": "metadata.csv",
        "encodingFormat": "text/csv",
        "sha256": hashlib.sha256(table.encode()).hexdigest(),
    }
    images = {"@type": "cr:FileSet", "@id": "images", "encodingFormat": "image/png", "includes": "images/*/*.png"}
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"samples/{column}",
            "name": column,
            "dataType": "sc:Integer" if column in NUMBERS else "sc:Text",
            "source": {"fileObject": {"@id": "metadata.csv"}, "extract": {"column": column}},
        }
        for column in columns
    ]
    about = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": "Synthetic images of skin lesions, made by a trained generator. No image shows a patient.",
        "license": licence,
        "datePublished": date,
        "version": "1.0.0",
        "distribution": [csv_file, images],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "samples", "name": "samples", "field": fields}],
    }
    return json.dumps(about, indent=1).encode() + b"\n"
