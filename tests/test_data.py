"""data.py: every layout in miniature with its quirks, bad images, batches, the index, the phantom.

SPDX-License-Identifier: MIT
"""

import csv
import errno
import gzip
import io
import json
import math
import os
import pickle
import shutil
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

import data
from data import CONDITIONS, Manifest, Studies, UserError, global_batches, main, pixels, read_image
from negations import label_report, positives

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
CLASSES = ",".join(("No Finding", *CONDITIONS[:-1]))  # CheXpert's tables put No Finding first
GRAPH = {
    "text": "no edema", "entities": {"1": {"tokens": "edema", "label": "OBS-DA", "relations": []}}}


# ---------------------------------------------------------------- layouts in miniature


def write(path, text, encoding="utf-8"):
    """Writes text (gzipped if the name says so), bytes or a small image; -> path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(path)
    else:
        raw = text if isinstance(text, bytes) else text.encode(encoding)
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def openi_xml(root):
    report = ('<?xml version="1.0"?><eCitation><uId id="CXR{0}"/><Abstract>'
              '<AbstractText Label="FINDINGS">{1}</AbstractText>'
              '<AbstractText Label="IMPRESSION">{2}</AbstractText></Abstract>'
              "<MeSH><major>{3}</major><automatic>pneumonia</automatic></MeSH>{4}</eCitation>")
    image = '<parentImage id="CXR{0}_IM-000{0}-1001"/><parentImage id="CXR{0}_IM-000{0}-2001"/>'
    for number, findings, impression, mesh, images in (
            (1, "Heart normal.", "Normal chest.", "normal", image),
            (2, "Wide heart.", "", "Cardiomegaly/mild", image),
            (3, "", "", "normal", image),
            (4, "Clear.", "Clear.", "normal", ""),
            (5, "Clear.", "", "No Indexing", image)):
        text = report.format(number, findings, impression, mesh, images.format(number))
        write(root / f"ecgen-radiology/{number}.xml", text)
    write(root / "png/CXR1_IM-0001-1001.png", None)
    write(root / "png/CXR2_IM-0002-1001.png", None)
    return root


def openi_kaggle(root):
    write(root / "indiana_reports.csv",
          "\ufeffuid,MeSH,findings,impression\r\n"
          "1,normal,Clear lungs.,\r\n"
          '2,Cardiomegaly/borderline;Thickening/pleura,"Heart, large.\nWide.",Big heart.\r\n'
          "3,Thickening/lung,,\r\n")
    write(root / "indiana_projections.csv",
          "uid,filename,projection\r\n1,1_IM-1.dcm.png,Frontal\r\n1,1_IM-2.dcm.png,Lateral\r\n"
          "2,2_IM-3.dcm.png,Frontal\r\n2,2_IM-4.dcm.png,Frontal\r\n3,3.png,Frontal\r\n")
    for name in ("1_IM-1", "2_IM-3", "2_IM-4"):
        write(root / f"images/images_normalized/{name}.dcm.png", None)
    return root


def mimic(root):
    rows = [("a1", "10000032", "50414267", "PA", "train"),
            ("a2", "10000032", "50414267", "LATERAL", "train"),
            ("b1", "11000001", "50000002", "AP", "validate"),
            ("c1", "12000001", "50000003", "PA", "test"),
            ("d1", "12000001", "50000004", "AP", "test")]
    write(root / "mimic-cxr-2.0.0-metadata.csv.gz",
          "dicom_id,subject_id,study_id,ViewPosition\n"
          + "\n".join(",".join(row[:4]) for row in rows))
    write(root / "mimic-cxr-2.0.0-split.csv.gz",
          "dicom_id,study_id,subject_id,split\n"
          + "\n".join(f"{d},{s},{p},{split}" for d, p, s, _, split in rows))
    others = ",".join(c for c in CONDITIONS if c not in ("Cardiomegaly", "Edema"))
    write(root / "mimic-cxr-2.0.0-chexpert.csv",
          f"subject_id,study_id,Cardiomegaly,Edema,{others}\n10000032,50414267,1.0,-1.0"
          + "," * others.count(",") + ",")
    head = "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n"
    for name, text in (
            ("p10/p10000032/s50414267",
             " FINDINGS: \n \n The heart is\n large.\n \n IMPRESSION: \n \n Big heart.\n"),
            ("p11/p11000001/s50000002",
             " IMPRESSION:  No acute process.\n\n NOTIFICATION:  Dr. ___\n"),
            ("p12/p12000001/s50000003", " COMPARISON: none.\n\n Only a paragraph.\n")):
        write(root / f"mimic-cxr-reports/files/{name}.txt", head + text)
    for dicom, subject, study, _, _ in rows:
        write(root / f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg", None)
    return root


def chexpert_plus(root):
    write(root / "df_chexpert_plus_240401.csv",
          "path_to_image,frontal_lateral,deid_patient_id,section_findings,section_impression,split\n"
          "train/patient1/study1/view1_frontal.jpg,Frontal,patient1,Edema,Large heart.,train\n"
          "train/patient1/study1/view2_lateral.jpg,Lateral,patient1,No edema.,Large heart.,train\n"
          "train/patient2/study1/view1_frontal.jpg,Frontal,patient2,No edema.,No effusion.,train\n"
          "valid/patient3/study1/view1_frontal.jpg,Frontal,patient3,,,valid\n"
          "valid/patient4/study1/view1_frontal.jpg,Frontal,patient4,,Fine lungs.,valid\n")
    first = {"path_to_image": "train/patient1/study1/view1_frontal.jpg"}
    for part, labels in {
            "findings": {"Edema": 1.0, "Pneumonia": None, "Cardiomegaly": 0.0},
            "impression": {"Cardiomegaly": -1.0, "Edema": 0.0, "No Finding": 1.0}}.items():
        write(root / f"chexbert_labels/{part}_fixed.json", json.dumps(first | labels) + "\n")
    for name in ("train/patient1", "train/patient2", "valid/patient4"):
        write(root / f"PNG/{name}/study1/view1_frontal.png", None)
    return root


def rsna(root, count=20):
    rows = [f"p{k:02d},{'1,2,3,4,1' if k % 4 == 0 else ',,,,0'}" for k in range(count)]
    write(root / "stage_2_train_labels.csv",
          "\n".join(["patientId,x,y,width,height,Target", *rows, "p00,5,6,7,8,1"]))
    names = ("Lung Opacity", "Normal", "No Lung Opacity / Not Normal", "Normal")
    write(root / "stage_2_detailed_class_info.csv",
          "patientId,class\n" + "\n".join(f"p{k:02d},{names[k % 4]}" for k in [*range(count), 0]))
    for k in range(count):
        write(root / f"stage_2_train_images/p{k:02d}.png", None)
    return root


def siim(root):
    rows = [f"im{k:02d}, -1" if k % 2 else f"im{k:02d},-1" for k in range(14)]
    rows += [f"im{k:02d}, 557374 2 1015 8" for k in (14, 14, 15, 15, 16)]
    write(root / "stage_2_train.csv", "ImageId, EncodedPixels\n" + "\n".join(rows))
    for k in range(17):
        write(root / f"dicom-images-train/a/b{k}/im{k:02d}.png", None)
    return root


def vindr(root):
    header = "image_id,rad_ID,Other diseases,Pleural effusion,No finding\n"
    rows = [f"t{k},R{r},{int(k == 1 and r == 2)},0,{int(k != 1 or r != 2)}"
            for k in range(10) for r in range(3)]
    write(root / "annotations/image_labels_train.csv", header + "\n".join(rows))
    header = header.replace("rad_ID,", "").replace("diseases", "disease")
    write(root / "annotations/image_labels_test.csv", header + "e1,0,1,0\ne2,0,0,1")
    for name in [f"train/t{k}" for k in range(10)] + ["test/e1", "test/e2"]:
        write(root / f"{name}.png", None)
    return root


def cxr14(root):
    names = [f"0000000{p}_00{k}.png" for p in range(1, 7) for k in range(2)]
    text = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
            "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n")
    for name in names:
        classes = "Effusion|Pleural_Thickening" if name[7] == "1" else "No Finding"
        text += f"{name},{classes},0,{int(name[7])},50,M,PA,2682,2749,0.143,0.143\n"
    write(root / "Data_Entry_2017_v2020.csv", text)
    write(root / "test_list.txt", "\n".join(names[8:]) + "\n")
    for k, name in enumerate(names):
        write(root / f"images_{k % 2 + 1:03d}/images/{name}", None)
    return root


def chexpert5x200(root):
    names = "Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"
    write(root / "chexpert_5x200.csv",
          f",Path,{names},Report Impression\n"
          "0,CheXpert-v1.0/train/patient1/study2/view1_frontal.jpg,1.0,0.0,0.0,0.0,0.0,"
          '"1. Band\natelectasis"\n'
          "1,CheXpert-v1.0/train/patient1/study2/view2_frontal.jpg,,1.0,None,-1,0,Big heart\n")
    for k in (1, 2):
        write(root / f"train/patient1/study2/view{k}_frontal.jpg", None)
    return root


def cxr_align(root):
    item = {"chosen": "pleural effusion", "report": "Left effusion. Big heart.",
            "omitted": "Big heart.", "negation": "Big heart. No effusion.", "location": "end"}
    write(root / "cxr-align.json", json.dumps({"mimic": {"abc-1": item, "abc-2": item}}))
    for name in ("files/p10/p10000032/s50414267/abc-1.jpg", "images/abc-2.jpg"):
        write(root / name, None)
    return root


LAYOUTS = {"openi": openi_kaggle, "mimic": mimic, "chexpert-plus": chexpert_plus, "rsna": rsna,
           "rsna-ab": rsna, "siim": siim, "vindr": vindr, "cxr14": cxr14,
           "chexpert5x200": chexpert5x200, "cxr-align": cxr_align}


def build(tmp_path, name, layout=None, *flags):
    root = (layout or LAYOUTS[name])(tmp_path / "official")
    main([name, str(root), "--out", str(tmp_path / "x.jsonl"), *flags])
    return {row["id"]: row for row in map(json.loads, open(tmp_path / "x.jsonl", encoding="utf-8"))}


# ---------------------------------------------------------------- builders


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_set_builds_a_manifest_that_check_accepts(tmp_path, name, capsys):
    rows = build(tmp_path, name)
    capsys.readouterr()
    main(["check", str(tmp_path / "x.jsonl")])  # exits 1 if something is wrong
    assert [f"{len(rows):,}", "studies"] == capsys.readouterr().out.split()[:2]
    for row in rows.values():
        assert row["split"] in data.SPLITS and Path(row["root"]).is_absolute()


@pytest.mark.parametrize("name", LAYOUTS)
def test_builders_open_no_image_and_count_the_missing(tmp_path, name, monkeypatch, capsys):
    root = LAYOUTS[name](tmp_path / "official")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("an image was opened"))
    images = [p for p in root.rglob("*") if p.suffix in (".png", ".jpg")]
    for path in images[1:]:
        path.unlink()
    out = tmp_path / "x.jsonl"
    main([name, str(root), "--out", str(out), "--keep-missing"])
    kept = len(out.read_text().splitlines())
    images[0].unlink()
    with pytest.raises(ValueError, match="official.*--keep-missing"):
        main([name, str(root), "--out", str(out)])
    assert len(out.read_text().splitlines()) == kept  # the good file was not touched
    main([name, str(root), "--out", str(out), "--keep-missing"])
    assert len(out.read_text().splitlines()) == kept
    assert "image not there" in capsys.readouterr().out


def test_openi_xml_takes_the_first_image_and_says_what_it_skips(tmp_path, capsys):
    folder = tmp_path / "open[i]"  # brackets are no pattern
    folder.mkdir()
    rows = build(folder, "openi", openi_xml, "--keep-missing")
    assert list(rows) == ["openi/1", "openi/2", "openi/5"]
    assert rows["openi/1"]["image"] == "png/CXR1_IM-0001-1001.png"
    assert rows["openi/1"]["report"] == "Heart normal. Normal chest."
    assert rows["openi/1"]["targets"]["No Finding"] == 1
    assert rows["openi/2"]["targets"]["Cardiomegaly"] == 1
    assert rows["openi/2"]["targets"]["Pneumonia"] == 0  # only the automatic tag said so
    assert "targets" not in rows["openi/5"]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 skipped: neither findings nor impression" in said
    assert "1 skipped: no frontal image listed" in said


def test_openi_kaggle_and_xml_name_one_image_alike(tmp_path):
    rows = build(tmp_path, "openi")
    assert list(rows) == ["openi/1", "openi/2", "openi/2/2_IM-4"]
    assert rows["openi/2"]["report"] == "Heart, large. Wide. Big heart."
    targets = rows["openi/2"]["targets"]
    assert targets["Pleural Thickening"] == targets["Cardiomegaly"] == 1
    assert set(targets.values()) == {0, 1}
    assert data.stem("CXR1_1_IM-0001-3001.png") == data.stem("images/1_IM-0001-3001.dcm.png")
    assert data.stem("CXR2_IM-0652-1001") == "2_IM-0652-1001" != data.stem("CXR22_IM-0652-1001")


def test_damaged_xml_is_named_and_text_behind_an_inline_tag_is_kept(tmp_path):
    xml = ('<e><AbstractText Label="FINDINGS">Heart <b>very</b> wide.</AbstractText>'
           "<MeSH><major>Cardio<i>megaly</i>/mild</major></MeSH></e>")
    write(tmp_path / "r.xml", xml)
    (_, _, report, mesh), = data.openi_xml(data.Download(tmp_path))
    assert report == "Heart very wide." and mesh == ["Cardiomegaly/mild"]
    strange = b'<?xml version="1.0" encoding="klingon"?><a/>'
    for text in (b"<a><b></a>", b"<a>\xff</a>", b"", strange, strange.replace(b"klingon", b"gbk")):
        write(tmp_path / "r.xml", text)
        with pytest.raises(UserError, match="r.xml: expected well-formed XML"):
            main(["openi", str(tmp_path), "--out", str(tmp_path / "x.jsonl")])


def test_mimic_keeps_frontal_views_and_parses_sections(tmp_path, capsys):
    rows = build(tmp_path, "mimic")
    assert {key: (row["split"], row["report"]) for key, row in rows.items()} == {
        "mimic/a1": ("train", "The heart is large. Big heart."),
        "mimic/b1": ("val", "No acute process."),
        "mimic/c1": ("test", "Only a paragraph."),
    }
    assert rows["mimic/a1"]["labels"] == {"Cardiomegaly": 1, "Edema": -1}
    assert "labels" not in rows["mimic/b1"]  # it has no row in chexpert.csv
    assert rows["mimic/a1"]["image"] == "files/p10/p10000032/s50414267/a1.jpg"
    assert rows["mimic/a1"]["study_id"] == "50414267"  # of RadGraph's records, in the cache too
    said = " ".join(capsys.readouterr().out.split())
    assert "1 skipped: view not PA or AP" in said and "2 neither labels nor targets" in said
    assert "1 skipped: no report file files/pNN/PATIENT/STUDY.txt here or in mimic" in said
    table = tmp_path / "official/mimic-cxr-2.0.0-metadata.csv.gz"
    text = gzip.decompress(table.read_bytes()).decode()
    write(table, text.replace("a1,10000032,50414267", "a1,10000032,504*"))  # no pattern
    assert "mimic/a1" not in build(tmp_path, "mimic", lambda root: root)


LAYOUTS_OF_REPORTS = [  # "/" begins a line, "//" is a blank one
    ("FINDINGS: Lungs clear.//IMPRESSION: Fine.", "Lungs clear. Fine."),
    ("CHEST, TWO VIEWS: Lungs clear.//IMPRESSION: Fine.", "Lungs clear. Fine."),
    ("PORTABLE AP CHEST RADIOGRAPH: Lungs clear.", "Lungs clear."),
    ("FRONTAL AND LATERAL VIEWS: Lungs clear.//IMPRESSION: Fine.", "Lungs clear. Fine."),
    ("PA AND LATERAL VIEWS OF THE CHEST: Lungs clear.", "Lungs clear."),
    ("CHEST (2 VIEWS): Lungs clear.", "Lungs clear."),
    ("SINGLE AP UPRIGHT: Lungs clear.", "Lungs clear."),
    ("CHEST:/ Lungs clear.", "Lungs clear."),
    ("PORTABLE CHEST:/INDICATION: Cough./FINDINGS: Lungs clear.", "Lungs clear."),
    ("CHEST, PA AND LAT:///HISTORY: Cough.//IMPRESSION: Fine.", "Fine."),
    ("FINDINGS: Lungs clear.//IMPRESSON: Fine.", "Lungs clear. Fine."),
    ("FINDNGS: Lungs clear.//IMPRESION: Fine.", "Lungs clear. Fine."),
    ("FINIDNGS: Lungs clear.//IMPERSSION: Fine.", "Lungs clear. Fine."),
    ("FINDING: Lungs clear.//MPRESSION: Fine.", "Lungs clear. Fine."),
    ("INDICATON: Cough.//CONCLUSIONS: Fine.", "Fine."),
    ("REFERENCE FINDINGS: Lungs clear.", "Lungs clear."),
    ("PROVISIONAL FINDINGS IMPRESSION (PFI): Fine.", "Fine."),
    ("PFI: Maybe.//FINDINGS: Lungs clear.", "Lungs clear."),
    ("FINDINGS: Lungs clear.//FINAL IMPRESSION: Fine.", "Lungs clear. Fine."),
    ("FINDINGS AND IMPRESSION: Fine.", "Fine."),
    ("FINDINGS, IMPRESSION: Fine.", "Fine."),
    ("WET READ: Maybe.//FINDINGS: Lungs clear.", "Lungs clear."),
    ("FINDINGS: Lungs clear.//WET READ VERSION: Maybe.", "Lungs clear."),
    ("Findings: Lungs clear.//Impression: Fine.", "Lungs clear. Fine."),
    ("Indication: Cough.//Final impression: Fine.", "Fine."),
    ("Chest, two views: Lungs clear./Note that: no prior./IMPRESSION: Fine.",
     "Lungs clear. Note that: no prior. Fine."),
    ("FINDINGS: Lungs clear./Comparison with the study of May shows: no change./IMPRESSION: Fine.",
     "Lungs clear. Comparison with the study of May shows: no change. Fine."),
    ("ADDENDUM: More.//IMPRESSION: Old.//FINAL REPORT//FINDINGS: Lungs clear.//IMPRESSION: New.",
     "Lungs clear. New."),
    ("IMPRESSION: Fine.//ADDENDUM: More.//IMPRESSION:/", "Fine."),
    ("INDICATION: Cough.//Lungs clear./Heart normal.", "Lungs clear. Heart normal."),
    ("FINAL REPORT/Chest film//History of cough.//Lungs clear.", "History of cough. Lungs clear."),
    ("COMPARISON: None.//FINDINGS:/IMPRESSION:///Lungs clear.", "Lungs clear."),
    ("INDICATION: Cough.", ""),
    ("INDICATION:///Lungs clear.//FINDINGS:///IMPRESSION:/", "Lungs clear."),
    ("FINDINGS:/LUNGS: Clear./HEART: Normal.//IMPRESSION: Fine.",
     "LUNGS: Clear. HEART: Normal. Fine."),
    ("FINDINGS: LUNGS: Clear./CHEST WALL: Normal./RIBS: Intact./Bones: Old.",
     "LUNGS: Clear. CHEST WALL: Normal. RIBS: Intact. Bones: Old."),
    ("FINDINGS: Lungs clear.//NOTIFICATION: Called.", "Lungs clear."),
    ("IMPRESSION: Fine.//RECOMMENDATION(S): Repeat.", "Fine."),
    ("FINDINGS:/IMPRESSION: Fine.", "Fine."),
    ("FINDINGS:/CHEST, TWO VIEWS: Lungs clear.", "Lungs clear."),
    ("FINDINGS:/AP CHEST RADIOGRAPH: Lungs clear.", "Lungs clear."),
    ("FINDINGS: At 10:30, lungs clear./IMPRESSION: Fine.", "At 10:30, lungs clear. Fine."),
    ("FINDINGS: Lungs clear./Compared to prior study: no change.//IMPRESSION:/On this study: fine.",
     "Lungs clear. Compared to prior study: no change. On this study: fine."),
    ("FINDINGS:/FRONTAL VIEW: Clear./LATERAL VIEW: Spine old.", "Clear. LATERAL VIEW: Spine old."),
    ("FINDINGS: Clear.//IMPRESSION: Fine./Ribs: Old fracture./Left chest tube: in place.",
     "Clear. Fine. Ribs: Old fracture. Left chest tube: in place."),
    ("REASON FOR EXAM: CHEST PAIN//CLINICAL INFORMATION: Chest.//IMPRESSION : Fine.", "Fine."),
]


def test_a_report_of_mimic_is_its_findings_and_impression_in_any_layout(tmp_path):
    for margin in (" ", "", "    "):
        for layout, report in LAYOUTS_OF_REPORTS:
            text = f"\n{' ' * 30}FINAL REPORT/{layout}/".replace("/", f"\n{margin}")
            assert data.mimic_report(write(tmp_path / "s.txt", text)) == report, layout
    assert data.mimic_report(write(tmp_path / "s.txt", "")) == ""


def test_chexpert_plus_adds_the_labels_of_both_sections_found_by_name(tmp_path, capsys):
    rows = build(tmp_path, "chexpert-plus")
    assert list(rows) == [f"chexpert-plus/patient{k}/study1" for k in (1, 2, 4)]
    assert rows["chexpert-plus/patient1/study1"]["labels"] == {"Edema": 1, "Cardiomegaly": -1}
    assert rows["chexpert-plus/patient2/study1"]["report"] == "No edema. No effusion."
    assert rows["chexpert-plus/patient4/study1"]["split"] == "val"
    assert ["labels" in row for row in rows.values()] == [True, False, False]
    assert "2  neither labels nor targets" in capsys.readouterr().out
    labels = tmp_path / "official/chexbert_labels"
    for folder in ("official", "official/CheXbert_Labels", "official/more/labels"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("findings_fixed.json", "impression_fixed.json"):
            shutil.move(labels / name, tmp_path / folder / name)
        labels = tmp_path / folder
        assert build(tmp_path, "chexpert-plus", lambda root: root) == rows
    for wrong in ('{"path_to_image": ["a"], "Edema": 1}', '{"path_to_image": "a", "Edema": [1]}'):
        write(labels / "findings_fixed.json", wrong)
        with pytest.raises(UserError, match="findings_fixed.json:1: expected"):
            build(tmp_path, "chexpert-plus", lambda root: root)


def test_the_numpy_split_is_scikit_learns():
    selection = pytest.importorskip("sklearn.model_selection")
    for n in (20, 101, 2668):
        ids = [f"id{k}" for k in range(n)]
        train, rest = selection.train_test_split(ids, test_size=0.3, random_state=0)
        test, val = selection.train_test_split(rest, test_size=0.5, random_state=0)
        own = data.glorias_split(ids)
        for part, names in (("train", train), ("val", val), ("test", test)):
            assert {k for k, split in own.items() if split == part} == set(names)
    counts = Counter(data.glorias_split(range(26684)).values())
    assert counts == {"train": 18678, "val": 4003, "test": 4003}


def test_rsna_ab_drops_normals_and_keeps_the_split(tmp_path):
    whole = build(tmp_path, "rsna")
    assert sum(row["targets"]["Pneumonia"] for row in whole.values()) == 5 and len(whole) == 20
    some = build(tmp_path, "rsna-ab")
    assert len(some) == 10 and sum(row["targets"]["Pneumonia"] for row in some.values()) == 5
    for key, row in some.items():
        assert row["split"] == whole[key.replace("rsna-ab", "rsna")]["split"]


def test_siim_strips_the_space_and_does_not_leak(tmp_path):
    rows = build(tmp_path, "siim")
    assert len(rows) == 17 and sum(row["targets"]["Pneumothorax"] for row in rows.values()) == 3
    assert len({row["image"] for row in rows.values()}) == 17


def test_vindr_ors_the_readers_and_takes_the_consensus(tmp_path):
    rows = build(tmp_path, "vindr")
    first = {"Other disease": 1, "Pleural Effusion": 0, "No Finding": 0}
    assert rows["vindr/t1"]["targets"] == first
    assert rows["vindr/e1"]["targets"].keys() == first.keys()
    assert rows["vindr/t2"]["targets"]["No Finding"] == 1
    assert rows["vindr/e1"]["targets"]["Pleural Effusion"] == 1
    assert rows["vindr/e1"]["split"] == "test"
    assert Counter(row["split"] for row in rows.values()) == {"train": 8, "val": 2, "test": 2}


def test_cxr14_takes_the_official_lists_or_says_that_it_cannot(tmp_path, capsys):
    rows = build(tmp_path, "cxr14")
    assert {row["patient"] for row in rows.values() if row["split"] == "test"} == {"5", "6"}
    assert rows["cxr14/00000001_000"]["targets"]["Pleural Effusion"] == 1
    assert rows["cxr14/00000001_000"]["targets"]["Pleural Thickening"] == 1
    assert "not the official split" not in capsys.readouterr().out
    (tmp_path / "official/test_list.txt").unlink()
    rows = build(tmp_path, "cxr14", lambda root: root)
    assert "not the official split" in capsys.readouterr().out
    assert all(row["split"] == data.split_of(row["patient"]) for row in rows.values())


def test_probmed_keeps_its_images_and_pairs_and_names_a_malformed_entry(tmp_path):
    image = "chest/00000001_000.png"
    items = [{"image": image, "qa_type": kind, "question": question, "answer": answer, "id": 1}
             for kind, question, answer in (
                 ("entity_gt_0", "Is there effusion in this image?", "yes"),
                 ("entity_hallu_0", "Is there pleural thickening?", "no"),
                 ("modality_gt", "Is this an X-ray?", "yes"))]
    path = write(tmp_path / "test.json", json.dumps(items))
    rows = build(tmp_path, "cxr14", None, "--probmed", str(path))
    assert list(rows) == ["cxr14/00000001_000"]
    assert rows["cxr14/00000001_000"]["adversarial"] == [["Pleural Effusion", "Pleural Thickening"]]
    for change in ({"image": 5}, {"qa_type": ["entity_gt_0"]}, {"question": None}):
        with pytest.raises(UserError, match="test.json: entry 1: expected"):
            data.probmed_pairs(write(path, json.dumps([items[0], items[1] | change])))
    with pytest.raises(UserError, match="test.json: entry 0: expected"):
        data.probmed_pairs(write(path, '["x"]'))
    with pytest.raises(UserError, match="test.json: expected a JSON .* list"):
        data.probmed_pairs(write(path, "{}"))


def test_chexpert5x200_and_cxr_align_are_test_sets(tmp_path):
    rows = build(tmp_path, "chexpert5x200")
    assert list(rows) == ["chexpert5x200/patient1/study2",
                          "chexpert5x200/patient1/study2/view2_frontal"]
    assert rows["chexpert5x200/patient1/study2"]["report"] == "1. Band atelectasis"
    rows = build(tmp_path / "b", "cxr-align")
    one = rows["cxr-align/abc-1"]
    assert one["patient"] == "10000032"
    assert one["hard_negatives"][0]["condition"] == "Pleural Effusion"
    assert one["hard_negatives"][0]["report"] == "Big heart. No effusion."
    assert "labels" not in one  # CXR-Align has none
    path = tmp_path / "b/official/cxr-align.json"
    text = path.read_text()
    for chosen in ("Pleural_Effusion", " PLEURAL effusion ", "effusion"):
        write(path, text.replace("pleural effusion", chosen))
        again = build(tmp_path / "b", "cxr-align", lambda root: root)
        assert again["cxr-align/abc-1"]["hard_negatives"] == one["hard_negatives"], chosen
    write(path, text.replace("pleural effusion", "gallstone"))
    with pytest.raises(UserError, match="mimic, entry 0: .* conditions, got gallstone"):
        build(tmp_path / "b", "cxr-align", lambda root: root)
    write(tmp_path / "list/cxr-align.json", "[1]")
    with pytest.raises(ValueError, match="cxr-align.json: expected a JSON .* dict"):
        main(["cxr-align", str(tmp_path / "list"), "--out", str(tmp_path / "x.jsonl")])


def test_linked_files_and_folders_are_read(tmp_path):
    (tmp_path / "links").mkdir()
    for path in openi_kaggle(tmp_path / "official").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    main(["openi", str(tmp_path / "links"), "--out", str(tmp_path / "x.jsonl")])
    main(["cache", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "c"), "--workers", "0"])
    assert len(Manifest(tmp_path / "c/x.jsonl")) == 3


@pytest.mark.parametrize("name, file, old, new, where", [
    ("rsna", "stage_2_train_labels.csv", "p03,,,,,0", "p03,,,,,2", ":5: "),
    ("rsna", "stage_2_train_labels.csv", "Target", "target", ":1: "),
    ("rsna", "stage_2_train_labels.csv", "width", "Target", ":1: "),
    ("siim", "stage_2_train.csv", "557374 2 1015 8", "557374 2 x", ":16: "),
    ("cxr14", "Data_Entry_2017_v2020.csv", "No Finding,0,2", "Nothing,0,2", ":4: "),
    ("cxr14", "Data_Entry_2017_v2020.csv", "PA,2682", "PA,x,2682", ":2: "),
    ("chexpert5x200", "chexpert_5x200.csv", "-1,0,Big", "maybe,0,Big", ":4: "),
    ("mimic", "mimic-cxr-2.0.0-chexpert.csv", "1.0,-1.0", "1.0,7", ":2: "),
])
def test_errors_name_file_and_line(tmp_path, name, file, old, new, where):
    root = LAYOUTS[name](tmp_path / "official")
    text = (root / file).read_text(encoding="utf-8")
    assert old in text
    (root / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file}{where}expected"):
        main([name, str(root), "--out", str(tmp_path / "x.jsonl")])


def test_damaged_tables_are_one_line_with_their_name(tmp_path):
    for text in ("1,n,caf\xe9,\n", '1,n,f,"left\n2,n,f,right\n'):
        table = f"uid,MeSH,findings,impression\n{text}"
        write(tmp_path / "indiana_reports.csv", table, "latin-1")
        # An unclosed quote would make one report of two patients'.
        with pytest.raises(UserError, match="indiana_reports.csv:1: expected a complete .* UTF-8"):
            list(data.Download(tmp_path).table("indiana_reports.csv"))
    path = mimic(tmp_path) / "mimic-cxr-2.0.0-split.csv.gz"
    whole = path.read_bytes()
    for at in range(0, 60, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
        try:  # of the header's bytes some do not matter
            list(data.Download(tmp_path).table("mimic-cxr-2.*-split.csv", "dicom_id"))
        except UserError as error:
            assert "split.csv.gz:" in str(error) and "\n" not in str(error)
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="split.csv.gz:.*complete"):
        list(data.Download(tmp_path).table("mimic-cxr-2.*-split.csv", "dicom_id"))


def test_a_data_set_is_added_by_the_lines_of_the_docstring(tmp_path, monkeypatch, capsys):
    example = data.__doc__[data.__doc__.index("    import ast") :].split("\n\nAn image")[0]
    names = {}
    exec(textwrap.dedent(example), vars(data) | names, names)
    builder = names.pop("build_padchest")
    builder.__globals__.update(names)
    monkeypatch.setitem(data.BUILDERS, "padchest", builder)

    def padchest(root):
        rows = [("1_a.png", "s1", "p1", "PA", "neumonia .", "['pneumonia', ' mass', '']"),
                ("1_b.png", "s1", "p1", "L", "neumonia .", "['pneumonia']"),
                ("2_a.png", "s2", "p2", "AP_horizontal", "normal .", "['normal']"),
                ("3_a.png", "s3", "p3", "AP", "normal .", "['normal']"),
                ("4_a.png", "s4", "p4", "PA", "normal .", ""),
                ("5_a.png", "s5", "p5", "PA", "", "['massive']")]
        table = io.StringIO()
        csv.writer(table).writerows([
            ("", "ImageID", "StudyID", "PatientID", "Projection", "Report", "Labels"),
            *((k, *row) for k, row in enumerate(rows))])
        write(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", table.getvalue())
        for name in ("0/1_a.png", "54/2_a.png"):
            write(root / name, None)
        return root

    rows = build(tmp_path, "padchest", padchest)
    assert {key: (row["image"], row["targets"]) for key, row in rows.items()} == {
        "padchest/s1": ("0/1_a.png", {"Mass": 1, "No Finding": 0}),
        "padchest/s2": ("54/2_a.png", {"Mass": 0, "No Finding": 1})}
    said = " ".join(capsys.readouterr().out.split())
    assert "1 image not there" in said and "1 skipped: view not frontal" in said
    assert "2 skipped: no labels or no report" in said
    main(["check", str(tmp_path / "x.jsonl")])


def test_out_never_replaces_a_file_of_the_download(tmp_path):
    for name, file in (("rsna", "stage_2_train_labels.csv"), ("cxr-align", "cxr-align.json")):
        path = LAYOUTS[name](tmp_path / name) / file
        whole = path.read_bytes()
        with pytest.raises(UserError, match=f"{file}: expected a new file, or a manifest"):
            main([name, str(tmp_path / name), "--out", str(path)])
        assert path.read_bytes() == whole


def test_the_help_of_a_set_tells_its_files(capsys):
    for name, words in (("mimic", "mimic-cxr-reports.zip"), ("cxr14", "test_list.txt"),
                        ("phantom", "--normal-fraction"), ("cache", "--image-root")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert words in "".join(capsys.readouterr().out.replace("-\n", "-").split())


def test_two_images_of_one_name_are_an_error_that_names_both(tmp_path):
    for path in ("png/a.png", "masks/a.png", "dicom/a.dcm", "png/b.png", "dicom/b.dcm"):
        write(tmp_path / path, None if path.endswith("png") else b"")
    official = data.Download(tmp_path)
    assert official.image("dicom/b.dcm") == "png/b.png"  # DICOM comes last
    assert official.image("c.png") == "c.png"
    with pytest.raises(UserError) as error:
        official.image("a.dcm")
    assert "png/a.png" in str(error.value) and "masks/a.png" in str(error.value)
    write(tmp_path / "masks/B.PNG", None).rename(tmp_path / "dicom/B.DCM")
    assert official.image("dicom/B.DCM", folders=1) == "dicom/B.DCM"  # an index of its own


def test_a_pipe_in_the_place_of_a_file_is_refused_and_does_not_hang(tmp_path):
    for name in ("x.png", "x.dcm", "m.jsonl", "cxr-align.json", "indiana_projections.csv"):
        os.mkfifo(tmp_path / name)
    write(tmp_path / "indiana_reports.csv", "uid,MeSH,findings,impression\n")
    for work in (
        lambda: read_image(tmp_path / "x.png"),
        lambda: read_image(tmp_path / "x.dcm"),
        lambda: Manifest(tmp_path / "m.jsonl"),
        lambda: main(["check", str(tmp_path / "m.jsonl")]),
        lambda: main(["cxr-align", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]),
        lambda: main(["openi", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]),
    ):
        with pytest.raises(UserError, match="regular file"):
            work()


def test_output_follows_links_and_leaves_pipes_and_devices_alone(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/out.txt")
    with data.open_atomic(tmp_path / "link") as file:
        file.write("here")
    assert (tmp_path / "far/out.txt").read_text() == "here" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path / "far"):
        with pytest.raises(UserError, match="regular file"):
            with data.open_atomic(path) as file:
                file.write("x")
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    with data.open_atomic(tmp_path / "new/dir/out.txt") as file:  # its folders are made
        file.write("x")
    with pytest.raises(UserError, match="out.txt: was not written .File exists"):
        with data.open_atomic(tmp_path / "new/dir/out.txt/out.txt") as file:
            file.write("x")


def test_what_a_kill_left_a_day_ago_is_removed_when_the_file_is_next_written(tmp_path):
    for name, hours in ((".x[1].txt.7.tmp", 25), (".x[1].txt.8.tmp", 1), (".y.txt.9.tmp", 25)):
        os.utime(write(tmp_path / name, "half"), (time.time() - 3600 * hours,) * 2)
    with data.open_atomic(tmp_path / "x[1].txt") as file:
        file.write("whole")
    assert sorted(os.listdir(tmp_path)) == [".x[1].txt.8.tmp", ".y.txt.9.tmp", "x[1].txt"]


def test_a_full_disk_is_the_users_and_a_mistake_in_the_block_ours(tmp_path):
    target = write(tmp_path / "out.txt", "whole")
    with pytest.raises(UserError, match="out.txt: was not written .No space"):
        with data.open_atomic(target) as file:
            file.write("half")
            os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    for mistake, kind in ((lambda: open(tmp_path / "none"), FileNotFoundError), (int, ValueError)):
        with pytest.raises(kind) as error:
            with data.open_atomic(target) as file:
                mistake() if mistake is not int else int("x")
        assert not isinstance(error.value, UserError)
    assert target.read_text() == "whole" and os.listdir(tmp_path) == ["out.txt"]


def test_only_a_user_error_is_one_line(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as end:
        data.run_main(lambda: fail(UserError("m.jsonl:3: expected x")))
    assert end.value.code == 2 and capsys.readouterr().err == "error: m.jsonl:3: expected x\n"
    for error in (ValueError("ours"), OSError("ours"), RuntimeError("ours")):
        with pytest.raises(type(error), match="ours"):
            data.run_main(lambda error=error: fail(error))


@needs_shared
def test_real_openi_in_both_layouts(tmp_path):
    main(["openi", str(SHARED / "openi"), "--out", str(tmp_path / "k.jsonl")])
    kaggle = [json.loads(line) for line in open(tmp_path / "k.jsonl")]
    assert len(kaggle) == 3062 and len({row["patient"] for row in kaggle}) == 2956
    shutil.unpack_archive(SHARED / "openi/NLMCXR_reports.tgz", tmp_path / "xml")
    main(["openi", str(tmp_path / "xml"), "--out", str(tmp_path / "x.jsonl"), "--keep-missing"])
    xml = {row["id"]: row for row in map(json.loads, open(tmp_path / "x.jsonl"))}
    both = [row for row in kaggle if row["id"] in xml]
    assert len(both) > 2900 and all(row["split"] == xml[row["id"]]["split"] for row in both)
    same = [all(row.get(name) == xml[row["id"]].get(name) for name in ("report", "targets"))
            for row in both]
    assert np.mean(same) > 0.99


# ---------------------------------------------------------------- images


def test_a_12_bit_ramp_survives_and_a_flat_image_is_black(tmp_path):
    ramp = np.tile(np.arange(4096, dtype=np.uint16), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    grey = np.asarray(read_image(tmp_path / "ramp.png"))
    assert np.array_equal(grey[0], np.round(np.arange(4096) * 255 / 4095).astype(np.uint8))
    clipped = np.asarray(Image.open(tmp_path / "ramp.png").convert("L"))
    assert (clipped == 255).mean() > 0.9  # the negative control: what a plain convert does
    Image.fromarray(np.full((8, 8), 700, np.uint16)).save(tmp_path / "flat.png")
    assert np.asarray(read_image(tmp_path / "flat.png")).max() == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_every_png_mode_reads_as_grey(tmp_path, mode):
    Image.fromarray(np.full((6, 5), 255, np.uint8)).convert(mode).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.mode == "L" and image.size == (5, 6) and np.asarray(image).min() > 250


def bad_images(folder):
    """name -> path of a file that must be refused."""
    good = write(folder / "good.png", None).read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG")
    huge = io.BytesIO()
    header = b"\x89PNG\r\n\x1a\n"
    PngImagePlugin.putchunk(huge, b"IHDR", b"\0\0\xff\xff\0\0\xff\xff\x08\0\0\0\0")
    gif = io.BytesIO()
    Image.fromarray(noise).save(gif, "GIF")
    files = {
        "truncated": jpeg.getvalue()[:2000],
        "empty": b"",
        "huge": header + huge.getvalue() + good[33:],
        "gif": gif.getvalue(),
        "text": b"hello",
        "half": good[:50],
        "flipped": good[:45] + b"\0\0" + good[47:],
    }
    return {name: write(folder / f"{name}.png", content) for name, content in files.items()} | {
        "missing": folder / "nowhere.png",
        "folder": folder,
    }


def test_bad_images_are_an_error_that_names_the_file(tmp_path):
    for name, path in bad_images(tmp_path).items():
        with pytest.raises(UserError, match=f"{path.name}: expected"):
            read_image(path)
            pytest.fail(name)


def test_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (24, 20), dtype=np.uint8))
    small.resize((2000, 2400), Image.Resampling.BICUBIC).save(tmp_path / "x.jpg", quality=92)
    scaled, full = read_image(tmp_path / "x.jpg", at_least=224), read_image(tmp_path / "x.jpg")
    assert scaled.size == (250, 300) and full.size == (2000, 2400)
    difference = pixels(scaled, 224).astype(int) - pixels(full, 224)
    assert np.abs(difference).mean() < 2


def dicom(path, values, kind="MONOCHROME2", **fields):
    """Write a grey image of 8 or 16 bits, signed or not, or of floats, as DICOM."""
    pydicom = pytest.importorskip("pydicom")
    bits = 8 * values.itemsize
    header = pydicom.dataset.Dataset()
    header.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = pydicom.uid.generate_uid()
    header.Rows, header.Columns = values.shape
    header.SamplesPerPixel = 1
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(values.dtype.kind == "i")
    header.PhotometricInterpretation = kind
    if values.dtype.kind == "f":
        header.FloatPixelData = values.tobytes()
    else:
        header.PixelData = values.tobytes()
    for name, value in fields.items():
        setattr(header, name, value)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, header, enforce_file_format=True)
    return path


def test_a_dicom_is_shown_as_its_tables_say_or_refused(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    table = pydicom.dataset.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.LUTData = np.arange(65535, 65535 - 256, -1, dtype="<u2").tobytes()
    table.ModalityLUTType = "US"
    turned = ({"RescaleSlope": "-2", "RescaleIntercept": "9"}, {"PresentationLUTShape": "INVERSE"},
              {"VOILUTSequence": [table]}, {"ModalityLUTSequence": [table]})
    for fields in turned:
        image = np.asarray(read_image(dicom(tmp_path / "x.dcm", ramp, **fields)))
        assert np.array_equal(image, ramp[:, ::-1]), fields
    image = read_image(dicom(tmp_path / "x.dcm", ramp, WindowCenter="128", WindowWidth="128"))
    assert np.asarray(image)[0, [0, 64, 128, 192, 255]].tolist() == [0, 0, 129, 255, 255]
    image = read_image(dicom(tmp_path / "x.dcm", ramp, "MONOCHROME1", **turned[1]))
    assert np.array_equal(np.asarray(image), ramp[:, ::-1])  # one word for one inversion
    holes = ramp.astype(np.float32)
    holes[0, 0] = np.nan
    palette = {f"{name}PaletteColorLookupTable{part}": value
               for name in ("Red", "Green", "Blue")
               for part, value in (("Descriptor", [256, 0, 8]), ("Data", bytes(range(256))))}
    for path in (dicom(tmp_path / "nan.dcm", holes),
                 dicom(tmp_path / "palette.dcm", ramp, "PALETTE COLOR", **palette)):
        with pytest.raises(UserError, match=f"{path.name}: expected a grey image of one frame"):
            read_image(path)


def test_a_compressed_dicom_names_the_package_that_decodes_it(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = dicom(tmp_path / "x.dcm", np.zeros((8, 8), np.uint8))
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    header.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    header["PixelData"].VR = "OB"
    header.save_as(path)
    with pytest.raises(UserError, match="x.dcm: .*pylibjpeg") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    rows = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 32).reshape(24, 32))
    for name in ("x.jpg", "x.png"):
        rows.save(tmp_path / name, exif=exif)
        image = read_image(tmp_path / name)
        assert image.size == (24, 32)
        assert image.getpixel((2, 9)) > 200 and image.getpixel((22, 9)) < 30


@pytest.mark.parametrize("kind,lowest", [(np.uint16, 0), (np.int16, -32768)])
def test_dicom_monochrome1_is_inverted(tmp_path, kind, lowest):
    ramp = np.linspace(lowest, lowest + 65535, 64).astype(kind)  # -(-32768) overflows in int16
    ramp = np.tile(ramp, (8, 1))
    first, second = (
        np.asarray(read_image(dicom(tmp_path / f"{name}.dcm", ramp, name))).astype(int)
        for name in ("MONOCHROME1", "MONOCHROME2"))
    assert (first + second == 255).all() and second[0, 0] == 0 and second[0, -1] == 255


def test_a_dicom_without_an_image_is_a_user_error(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = dicom(tmp_path / "blank.dcm", np.zeros((8, 8), np.uint8))
    header = pydicom.dcmread(path)
    header.Rows = None
    header.save_as(path)
    write(tmp_path / "broken.dcm", b"not dicom")
    for name in ("blank.dcm", "broken.dcm", "missing.dcm"):
        with pytest.raises(UserError, match=f"{name}: expected"):
            read_image(tmp_path / name)


def test_a_mistake_of_ours_is_no_broken_image(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "x.png")
    monkeypatch.setattr(data, "to_grey", lambda values: values.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        read_image(tmp_path / "x.png")
    path = manifest_of(tmp_path, [{"image": "x.png", "split": "train"}])
    with pytest.raises(AttributeError, match="no_such_attribute"):
        studies_of(path, negatives=False, graphs=False)[(0, 0)]


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "x.dcm", "x")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match="x.dcm: .*pip install pydicom"):
        read_image(tmp_path / "x.dcm")


def test_the_crop_and_resize_is_one_step_within_the_image():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    whole = pixels(ramp, 50)
    assert whole.shape == (1, 50, 50) and whole.dtype == np.uint8
    spans = [np.ptp(pixels(ramp, 50, np.random.default_rng(k)).astype(int)) for k in range(40)]
    assert all(0.8 * 199 < span <= 199 for span in spans) and len(set(spans)) > 5
    crops = [pixels(ramp, 50, np.random.default_rng(k))[0, 25].astype(int) for k in range(40)]
    assert all((np.diff(crop) >= 0).all() for crop in crops)  # never flipped


# ---------------------------------------------------------------- the manifest


def manifest_of(folder, rows, name="m.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "a.png", None)
    base = {"root": str(folder), "image": "a.png"}
    text = "".join(json.dumps({"id": f"s/{k}", **base, **row}) + "\n" for k, row in enumerate(rows))
    return write(folder / name, text)


def test_the_index_is_written_once_and_rebuilt_when_the_file_changes(tmp_path):
    path = manifest_of(tmp_path, [{"split": s, "patient": s} for s in ("train", "val", "train")])
    path.write_text("\n" + path.read_text() + "\n\n")
    manifest = Manifest(path, "train")
    assert [row["id"] for row in (manifest[0], manifest[1])] == ["s/0", "s/2"]
    assert manifest.where(1) == f"{path}:4" and len(set(manifest.patients)) == 1
    sidecar = Path(f"{path}.index.npz")
    stamp = sidecar.stat().st_mtime_ns
    assert len(Manifest(path)) == 3 and sidecar.stat().st_mtime_ns == stamp
    with open(path, "a") as file:
        file.write(json.dumps({"id": "s/3", "image": "a.png"}) + "\n")
    assert len(Manifest(path)) == 4 and Manifest(path)[3]["id"] == "s/3"
    assert sidecar.stat().st_mtime_ns > stamp
    sidecar.write_bytes(b"\x93NUMPY rubbish")
    assert len(Manifest(path)) == 4


def test_a_sidecar_with_any_wrong_byte_is_rebuilt(tmp_path):
    rows = [{"split": "train", "patient": k % 3, "labels": {"Edema": k % 2}} for k in range(20)]
    path = manifest_of(tmp_path, rows)
    manifest, sidecar = Manifest(path), Path(f"{path}.index.npz")
    whole, rng = sidecar.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        raw = bytearray(whole)
        if rng.random() < 0.1:
            del raw[rng.integers(len(raw)) :]
        else:
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        sidecar.write_bytes(raw)
        again = Manifest(path)
        assert again.digest() == manifest.digest() and again[19] == manifest[19]
        assert np.array_equal(again.positives, manifest.positives)
        assert np.array_equal(again.patients, manifest.patients)


def test_forked_workers_read_their_own_rows_of_one_open_file(tmp_path):
    path = manifest_of(tmp_path, [{"report": "x" * (k * 37 % 5000)} for k in range(2000)])
    loader = DataLoader(Manifest(path), batch_size=None, num_workers=2,
                        multiprocessing_context="fork")
    assert [row["id"] for row in loader] == [f"s/{k}" for k in range(2000)]


def test_the_digest_sees_what_training_reads_and_nothing_else(tmp_path):
    negative = {"condition": "Edema", "omitted": "Clear.", "report": "No edema.", "labels": {}}
    row = {"patient": "7", "labels": {"Edema": 1}, "split": "train", "graph": GRAPH,
           "hard_negatives": [negative]}
    rows = [row | {"report": f"Edema {k}."} for k in range(3)]

    def digest(rows, name="m.jsonl", split="train"):
        return Manifest(manifest_of(tmp_path / "d", rows, name), split).digest()

    first = digest(rows)
    assert digest([row | {"root": "/else", "image": "b.png", "note": 1} for row in rows]) == first
    assert digest([dict(reversed(row.items())) for row in rows], "other.jsonl") == first
    assert digest([*rows, {"id": "s/9", "split": "val"}]) == first  # of another split
    changes = [{"id": "s/7"}, {"patient": "8"}, {"report": "Edema."}, {"labels": {"Edema": -1}},
               {"hard_negatives": []}, {"hard_negatives": [negative | {"report": "No edema!"}]},
               {"graph": {}}]
    changed = [digest([rows[0], rows[1] | change, rows[2]]) for change in changes]
    changed += [digest(rows[:2]), digest([rows[0], rows[2], rows[1]])]
    assert len({first, *changed}) == len(changed) + 1


def test_a_patient_that_is_null_or_absent_is_each_studys_own(tmp_path):
    rows = [{"patient": patient} for patient in (None, "", None, 7, "7", 0)]
    del rows[2]["patient"]
    patients = Manifest(manifest_of(tmp_path, rows)).patients.tolist()
    assert len(set(patients)) == 5 and patients[3] == patients[4]
    assert patients[0] == data.text_hash("s/0")


def test_an_empty_or_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty.jsonl: expected at least one line"):
        Manifest(write(tmp_path / "empty.jsonl", "\n\n"))
    with pytest.raises(UserError, match="none.jsonl: expected a regular file"):
        Manifest(tmp_path / "none.jsonl")


def test_the_index_falls_back_to_memory_where_it_cannot_be_written(tmp_path):
    path = manifest_of(tmp_path, [{"split": "test"}])
    Path(f"{path}.index.npz").mkdir()
    assert Manifest(path, "test")[0]["id"] == "s/0" and os.listdir(f"{path}.index.npz") == []
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


def test_the_index_stays_in_memory_on_a_disk_that_is_read_only(tmp_path, monkeypatch):
    path = manifest_of(tmp_path, [{"split": "test"}])

    def refuse(name, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

    for function in ("unlink", "mkdir", "replace"):  # a mounted disk refuses all of them
        monkeypatch.setattr(os, function, refuse)
    monkeypatch.setattr(data, "open", lambda name, mode="r", **options: open(name, mode, **options)
                        if "w" not in mode else refuse(name), raising=False)
    assert Manifest(path, "test")[0]["id"] == "s/0" and not os.path.exists(f"{path}.index.npz")


def test_a_manifest_pickles_small_and_reads_the_same(tmp_path):
    path = manifest_of(tmp_path, [{"split": "train", "report": str(k)} for k in range(2000)])
    manifest = Manifest(path, "train", image_root=str(tmp_path))
    raw = pickle.dumps(manifest)
    assert len(raw) < 1000
    copy = pickle.loads(raw)
    assert copy[1234] == manifest[1234] and copy.image_root == str(tmp_path)


@pytest.mark.parametrize("line", [
    "{",
    "[1]",
    '{"id": 1, "image": "a"}',
    '{"id": "a", "image": "b", "split": "dev"}',
    '{"id": "a"}',
    '{"id": "a", "image": "b", "targets": {"Edema": [1]}}',
    '{"id": "a", "image": "b", "hard_negatives": [{"labels": null}]}',
    '{"id": "a", "image": "b", "hard_negatives": [7]}',
    '{"id": "a", "image": "b", "labels": {"Edema": true}}',
    '{"id": "a", "image": "b", "adversarial": 7}',
    '{"id": "a", "image": "b", "patient": NaN}',
    '{"id": "a", "image": "b", "patient": true}',
    '{"id": "a", "image": "b", "patient": [7]}',
    '{"id": "a", "image": "b\\u0000"}',
    '{"id": "a", "image": "b", "root": "/\\u0000"}',
    '{"id": "a", "image": "b", "report": "\\ud800"}',
    '{"id": "a", "image": "b", "labels": {"Edema": [1]}}',
    '{"id": "a", "image": "b", "graph": {"0": []}}',
    '{"id": "a", "image": "b", "graph": {"entities": []}}',
    '{"id": "a", "image": "b", "graph": {"0": {"0": {"text": "", "entities": {}}}}}',
    '{"id": "a", "image": "b", "graph": {"entities": {"1": {"tokens": "x", "label": "OBS-DP", '
    '"relations": [["modify", ["1"]]]}}}}',
    "\xff",
])
def test_a_bad_line_is_named(tmp_path, line):
    path = manifest_of(tmp_path, [{}])
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    with pytest.raises(UserError, match="m.jsonl:2: .*expected"):
        Manifest(path)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname"])
def test_images_cannot_leave_their_root(tmp_path, image):
    write(tmp_path / "secret.png", None)
    path = manifest_of(tmp_path / "root", [{"image": image}, {}])
    manifest = Manifest(path)
    with pytest.raises(ValueError, match="m.jsonl:1: .*inside its root") as error:
        manifest.image_path(0)
    assert image not in str(error.value)
    assert manifest.image_path(1) == tmp_path / "root/a.png"


def test_positives_mark_the_conditions_and_uncertain_is_a_flag(tmp_path):
    negative = {"condition": "Edema", "report": "No edema.", "omitted": "Clear."}
    labels = {"Edema": 1, "Pneumonia": -1, "Fracture": 0, "No Finding": 1}
    rows = [{"labels": labels, "hard_negatives": [negative] * 2}]
    manifest = Manifest(manifest_of(tmp_path, rows))
    marked = [name for name, one in zip(CONDITIONS, manifest.positives[0], strict=True) if one]
    assert marked == ["Edema", "No Finding"] and manifest.negatives[0] == 2
    assert data.label_vector(labels).sum() == 3 and data.label_vector(labels, "negative").sum() == 2
    assert data.label_vector(labels)[CONDITIONS.index("Pneumonia")] == 1
    assert data.label_vector({}).sum() == 0


# ---------------------------------------------------------------- batches


def tokenize(texts):
    return {"length": torch.tensor([len(text) for text in texts])}


def studies_of(path, **options):
    defaults = dict(image_size=48, tokenize=tokenize, negatives=True, graphs=True, seed=3)
    return Studies(Manifest(path, "train"), **(defaults | options))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_batches_do_not_depend_on_the_number_of_workers(phantom):
    studies = studies_of(phantom)
    batches = []
    for epoch, workers in ((1, 0), (1, 2), (2, 0)):
        sampler = global_batches(len(studies), 32, 3, epoch)
        batches.append(list(DataLoader(studies, batch_sampler=sampler, num_workers=workers,
                                       collate_fn=studies.collate)))
    assert len(batches[0]) == len(studies) // 32
    assert all(same(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not same(batches[0][0]["pixels"], batches[2][0]["pixels"])  # the negative control
    batch = batches[0][0]
    assert batch["pixels"].shape == (32, 1, 48, 48) and batch["pixels"].dtype == torch.uint8
    assert batch["labels"].shape == batch["hard_labels"].shape == (32, len(CONDITIONS))
    assert batch["bad"] == 0
    assert len(batch["graph"]["sizes"]) == len(batch["hard_graph"]["sizes"]) == 32


def test_ranks_share_one_global_batch_and_resume_inside_an_epoch():
    whole = list(global_batches(103, 20, seed=5, epoch=2))
    parts = [list(global_batches(103, 20, seed=5, epoch=2, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole and len(whole) == 5
    assert list(global_batches(103, 20, seed=5, epoch=2, start=3)) == whole[3:]
    assert len(global_batches(103, 20, seed=5, epoch=2, start=3)) == 2
    assert list(global_batches(103, 20, seed=5, epoch=3)) != whole
    rows = [i for batch in whole for _, i in batch]
    assert len(set(rows)) == 100


def test_a_hard_negative_is_drawn_anew_each_epoch(phantom):
    studies = studies_of(phantom)
    i = next(i for i in range(len(studies)) if studies.manifest.negatives[i] > 1)
    stored = [negative["report"] for negative in studies.manifest[i]["hard_negatives"]]
    drawn = {studies[(epoch, i)]["negative"]["report"] for epoch in range(30)}
    assert drawn == set(stored)


def test_a_study_without_negatives_draws_a_report_with_one_positive(phantom):
    studies = studies_of(phantom)
    normal = [i for i in range(len(studies)) if studies.manifest.negatives[i] == 0]
    reports = {row["report"]: row for row in map(studies.manifest.__getitem__, range(len(studies)))}
    for i in normal[:20]:
        hard = studies[(0, i)]["negative"]
        assert len(positives(hard["labels"])) == 1 and hard == reports[hard["report"]]
        assert hard["report"] != studies.manifest[i]["report"]
    assert len({studies[(epoch, normal[0])]["negative"]["report"] for epoch in range(20)}) > 5


def test_negatives_without_any_candidate_are_refused(tmp_path):
    row = {"split": "train", "report": "Fine.", "labels": {"No Finding": 1}}
    path = manifest_of(tmp_path, [row] * 4)
    with pytest.raises(ValueError, match="negations.py"):
        studies_of(path)
    batch = (studies := studies_of(path, negatives=False, graphs=False)).collate([studies[(0, 1)]])
    assert set(batch) == {"pixels", "text", "labels", "index", "bad"}


def test_one_report_of_one_positive_is_no_negative_of_itself(tmp_path):
    rows = [{"split": "train", "report": "Fine.", "labels": {"No Finding": 1}}] * 3
    single = {"split": "train", "report": "Edema.", "labels": {"Edema": 1}}
    negative = {"condition": "Edema", "omitted": "", "report": "No edema.", "labels": {}}
    both = {"labels": {"Edema": 1, "Fracture": 1}, "hard_negatives": [negative]}
    path = manifest_of(tmp_path, [*rows, single, single, {"split": "train"} | both])
    with pytest.raises(UserError, match="m.jsonl: .*two different reports of one positive"):
        studies_of(path)
    studies_of(path, negatives=False)
    other = single | {"report": "A fracture.", "labels": {"Fracture": 1}}
    path = manifest_of(tmp_path, [*rows, *[single] * 60, other, {"split": "train"} | both])
    studies = studies_of(path, image_size=8)
    for epoch in range(5):
        for i in range(3, 63):  # most draws are the report itself
            assert studies[(epoch, i)]["negative"]["report"] == "A fracture."


def test_bad_images_are_replaced_and_reported_by_index(tmp_path):
    bad_images(tmp_path / "r")
    names = ("truncated.png", "empty.png", "huge.png", "gif.png", "missing.png")
    rows = [{"image": name, "split": "train", "report": name} for name in names]
    rows += [{"split": "train"}] * 15
    studies = studies_of(manifest_of(tmp_path / "r", rows), negatives=False, graphs=False)
    batch = studies.collate([studies[(0, i)] for i in range(20)])
    assert batch["pixels"].shape[0] == 20 and batch["bad"] == 5
    assert min(batch["index"]) >= 5 and batch["index"].tolist()[5:] == list(range(5, 20))
    again = studies.collate([studies[(0, i)] for i in range(20)])
    assert same(batch, again)


def test_a_folder_of_bad_images_stops_with_the_line(tmp_path):
    path = manifest_of(tmp_path, [{"image": "gone.png", "split": "train"}] * 3)
    with pytest.raises(ValueError, match="m.jsonl:2: expected images.*--image-root"):
        studies_of(path, negatives=False)[(0, 1)]


# ---------------------------------------------------------------- check and cache


def test_check_finds_what_is_wrong_and_prints_templates_alone(tmp_path, capsys):
    secret = {"split": "train", "patient": "7", "report": "Patient Miller has edema."}
    wrong = [{"image": "gone.png"}, {"labels": {"Edema": 2}}, {"labels": {"Oedema": 1}},
             {"targets": {"X": -1}}, {"graph": {"entities": {"1": {"tokens": "a", "label": "??"}}}},
             {"image": "../x.png"}, {"hard_negatives": [{"report": "r", "condition": "Flu"}]},
             {"report": 3}]
    rows = [secret, {"split": "test", "patient": "7"}, *wrong, {"id": "s/0"}]
    with pytest.raises(SystemExit) as end:
        main(["check", str(manifest_of(tmp_path, rows))])
    said = capsys.readouterr()
    assert end.value.code == 1 and "Miller" not in said.out + said.err
    for line in range(3, 3 + len(wrong)):
        assert f"m.jsonl:{line}: " in said.err, line
    assert "1 patients are in two splits" in said.err and "1 lines repeat an id" in said.err
    assert "lines repeat an image" in said.err  # one that was taken for another of its name
    rows = [{"report": "No change.", "patient": 7, "image": f"{k}.png"} for k in range(10)]
    rows += [{"report": report, "image": f"{k}.png"}
             for k, report in enumerate(("His own.", "His own.", ""), 10)]
    for row in rows:
        write(tmp_path / row["image"], None)
    main(["check", str(manifest_of(tmp_path, rows))])
    said = capsys.readouterr().out
    assert "10 x No change." in said and "own" not in said and "2  distinct reports" in said


def test_the_cache_resumes_and_keeps_the_picture(tmp_path, capsys):
    folder = tmp_path / "big"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 24), dtype=np.uint8))
    rows = [{"split": "train", "image": f"{k}.png"} for k in range(3)] + [{"image": "gone.png"}]
    path = manifest_of(folder, rows)
    for k in range(3):
        image.rotate(90 * k).resize((600, 750), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
    main(["cache", str(path), "--out", str(tmp_path / "c"), "--size", "128", "--workers", "2"])
    assert "1 left out, unreadable" in " ".join(capsys.readouterr().out.split())
    old, new = Manifest(path), Manifest(tmp_path / "c/m.jsonl")
    assert len(new) == 3 and new[0]["id"] == "s/0" and new[0]["split"] == "train"
    first = read_image(new.image_path(1))
    assert first.size == (128, 160)
    difference = pixels(first, 112).astype(int) - pixels(read_image(old.image_path(1)), 112)
    assert np.abs(difference).mean() < 2
    stamps = [os.stat(new.image_path(k)).st_mtime_ns for k in range(3)]
    os.unlink(new.image_path(2))
    main(["cache", str(path), "--out", str(tmp_path / "c"), "--size", "128"])
    now = [os.stat(new.image_path(k)).st_mtime_ns for k in range(3)]
    assert now[:2] == stamps[:2] and now[2] > stamps[2]
    with pytest.raises(ValueError, match="another folder"):
        main(["cache", str(path), "--out", str(folder)])
    path = manifest_of(tmp_path / "none", [{"image": "gone.png"}])
    with pytest.raises(ValueError, match="m.jsonl: expected images that can be read"):
        main(["cache", str(path), "--out", str(tmp_path / "new")])


def test_the_cache_sees_that_an_image_changed_and_keeps_equal_names_apart(tmp_path):
    def cached(name, grey):
        path = manifest_of(tmp_path / name, [{}], f"{name}.jsonl")
        Image.new("L", (9, 9), grey).save(tmp_path / name / "a.png")
        main(["cache", str(path), "--out", str(tmp_path / "c"), "--workers", "0"])
        return read_image(Manifest(tmp_path / f"c/{name}.jsonl").image_path(0)).getpixel((4, 4))

    assert abs(cached("one", 40) - 40) < 3 and abs(cached("two", 200) - 200) < 3
    assert abs(cached("one", 90) - 90) < 3  # of another time, maybe of equal size
    assert len(os.listdir(tmp_path / "c/images")) == 3


def test_a_killed_reading_process_ends_the_work_and_does_not_hang():
    with pytest.raises(UserError, match="^a reading process was killed[^\\n]*$"):
        list(data.run_jobs(os._exit, [1, 1, 1], 2))


# ---------------------------------------------------------------- the phantom


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    path = data.make_phantom(folder, studies=700, size=64, seed=2, duplicates=9)
    return [json.loads(line) for line in open(path)]


def test_the_phantom_draws_at_least_ten_conditions_and_normals_as_in_table_1(drawn):
    rows = drawn
    counts = Counter(name for row in rows for name, value in row["targets"].items() if value)
    assert sum(counts[name] >= 10 for name in CONDITIONS[:-1]) >= 10
    plain = [row["report"] for row in rows[:700] if row["report"] in data.NORMALS]
    assert 0.35 < len(plain) / 700 < 0.55 and set(plain) == set(data.NORMALS)
    share = 15829 / sum(data.NORMALS.values())
    error = 4 * math.sqrt(share * (1 - share) / len(plain))
    assert abs(plain.count("No acute cardiopulmonary process.") / len(plain) - share) < error
    assert [row["report"] for row in rows[700:]] == ["No active lung lesion."] * 9
    abnormal = [row["report"] for row in rows[:700] if row["report"] not in data.NORMALS]
    assert len(set(abnormal)) > 0.97 * len(abnormal)
    pairs = {(row["patient"], row["split"]) for row in rows}  # patients stay in one split
    assert len({patient for patient, _ in pairs}) == len(pairs) < len(rows)
    assert Counter(row["split"] for row in rows)["train"] > 0.7 * len(rows)


def test_the_labeler_agrees_with_the_phantoms_truth(drawn):
    truth = np.array([[row["targets"][name] for name in CONDITIONS] for row in drawn])
    labels = [label_report(row["report"]) for row in drawn]
    found = np.array([[own.get(name) == 1 for name in CONDITIONS] for own in labels])
    agreement = dict(zip(CONDITIONS, (truth == found).mean(0), strict=True))
    assert min(agreement.values()) >= 0.97, agreement


def test_every_condition_changes_the_picture_and_the_seed_decides(tmp_path, monkeypatch):
    finding = data.SimpleNamespace(amount=0.8, side="left", zone="mid", device="endotracheal tube")
    plain = np.asarray(data._draw_chest({}, 64, np.random.default_rng(5))).astype(int)
    for name in CONDITIONS[:-1]:
        drawn = data._draw_chest({name: finding}, 64, np.random.default_rng(5))
        image = np.asarray(drawn).astype(int)
        assert (np.abs(image - plain) > 25).sum() > 8, name
    monkeypatch.setattr(data, "CONDITIONS", ("Rickets", *CONDITIONS))
    with pytest.raises(UserError, match="rows for Rickets in PHRASES, DRAWINGS"):
        data.make_phantom(tmp_path / "new", studies=1)
    monkeypatch.undo()
    paths = [data.make_phantom(tmp_path / str(k), studies=12, seed=seed)
             for k, seed in enumerate((1, 1, 4))]
    texts = [path.read_text().replace(str(path.parent), "") for path in paths]
    pictures = [(path.parent / "images/000003.png").read_bytes() for path in paths]
    assert texts[0] == texts[1] != texts[2] and pictures[0] == pictures[1] != pictures[2]


def test_the_phantom_is_reused_until_its_settings_change(tmp_path, monkeypatch):
    stamps = []
    for settings in ({}, {}, {"seed": 1}):
        path = data.make_phantom(tmp_path, studies=8, **settings)
        stamps.append(path.stat().st_mtime_ns)
        time.sleep(0.02)
    assert stamps[0] == stamps[1] < stamps[2]
    changed = write(tmp_path / "data.py", Path(data.__file__).read_bytes() + b"# changed")
    monkeypatch.setattr(data, "__file__", str(changed))
    path = data.make_phantom(tmp_path, studies=8, seed=1)
    assert path.stat().st_mtime_ns > stamps[2]  # it is drawn anew after a change of the code
    stamp = path.stat().st_mtime_ns
    assert data.make_phantom(tmp_path, studies=8, seed=1).stat().st_mtime_ns == stamp
