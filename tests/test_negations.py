"""negations.py: labels, clean reports, hard negatives and graphs (Sec. 3, Sec. 4.1, Fig. 2).

    python tests/test_negations.py      prints what is measured on OpenI, with the README's table

All sentences here are made up. The tests on OpenI's reports skip where ../shared/data is absent.

SPDX-License-Identifier: MIT
"""
import csv
import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import negations as N  # noqa: E402
from data import UserError  # noqa: E402

OPENI = Path(__file__).resolve().parents[2] / "shared/data/openi"
needs_openi = pytest.mark.skipif(not OPENI.is_dir(), reason=f"OpenI's reports are not in {OPENI}")
E, C, LO, LL, ED, CO, PN, AT, PT, PE, PO, FR, SD, NF = N.CONDITIONS

CODES = dict(zip("E C LO LL ED CO PN AT PT PE PO FR SD".split(), N.CONDITIONS, strict=False))


def cases(table):
    """The rows of a table, whose cells stand between bars."""
    return [[cell.strip() for cell in row.split("|")] for row in table.strip().splitlines()]


def read_sentences():
    """tests/sentences.txt: {section: [(text, its labels)]}."""
    sections = {}
    for line in (ROOT / "tests/sentences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = sections.setdefault(line[2:].split(":")[0], [])
            continue
        text, codes = line.split(" | ")
        labels = {CODES[code[:-1]]: {"+": 1, "-": 0, "?": -1}[code[-1]]
                  for code in codes.split() if code not in "X=!"}
        if "!" not in codes and "X" not in codes.split():
            abnormal = any(labels[c] for c in labels if c != SD)
            labels |= {} if abnormal else {NF: 1}
        section.append((text, labels))
    return {name: rows for name, rows in sections.items() if rows}


SENTENCES = read_sentences()


@pytest.mark.parametrize(("report", "labels"), SENTENCES["causes"])
def test_the_rules_read_a_sentence_as_a_radiologist_would(report, labels):
    assert N.label_report(report) == labels


def share_right(section):
    rows = SENTENCES[section]
    return sum(N.label_report(text) == labels for text, labels in rows) / len(rows)


@pytest.mark.parametrize(("section", "least"), [("general", 0.97), ("hard", 0.85)])
def test_the_rules_read_most_of_the_sentences_that_were_written_before_they_were_mended(
        section, least):
    assert len(SENTENCES[section]) >= 100 and share_right(section) >= least


@pytest.mark.parametrize(("phrase", "texts", "others"), [
    ("effusion*", ["effusion", "effusions"], ["an effusio", "peffusion"]),
    ("*carcinoma", ["carcinoma", "adenocarcinoma"], ["carcinomas"]),
    ("air-space|lung [_] disease", ["airspace disease", "air space bad disease", "lung disease"],
     ["air disease", "lung very bad disease"]),
    ("<big> heart", ["enlarged heart", "large heart"], ["tall heart", "bigheart"]),
    ("heart ... enlarged", ["heart enlarged", "heart is very enlarged"],
     ["heart is normal but enlarged", "heart, enlarged"]),
    ("heart ,... enlarged", ["heart, lungs, aorta enlarged"], ["heart but enlarged"]),
    ("mass !effect", ["mass", "mass here"], ["mass effect"]),
    ("!joint fluid", ["fluid", "the fluid"], ["joint fluid"]),
    ("after (chest tube)", ["after chest tube"], ["after", "after chest"]),
    ("since #", ["since 2012", "since 5/12/2012"], ["since then"]),
    ("seen .", ["seen", "it is seen."], ["seen here"]),
    (": none", ["fluid: none"], ["none"]),
    ("[now|since]+ gone", ["now since now gone", "gone"], ["now"]),
    ("widened VPW", ["a widened vpw"], ["widened"]),
])
def test_the_notation_of_the_tables_reads_as_it_is_explained(phrase, texts, others):
    for expression in (N.matcher(phrase), N._grouped({"present": [phrase]})):
        assert all(expression.search(text) for text in texts)
        assert not any(expression.search(text) for text in others)
    if phrase.startswith("after"):  # what must follow is no part of the phrase
        assert N.matcher(phrase).search(texts[0])[0] == "after"


def test_conditions_are_in_chexberts_order_and_positives_leave_no_finding_out():
    assert (len(N.CONDITIONS), N.CONDITIONS[0], N.CONDITIONS[-1]) == (14, E, "No Finding")
    assert N.positives({NF: 1, PE: 1, E: 1, ED: -1, PT: 0}) == [E, PE]


@pytest.mark.parametrize("row", cases("""
    No pneumothorax or effusion. | No pneumothorax. | No effusion.
    Hyperinflation consistent with emphysema. | Hyperinflation consistent with emphysema.
    Neither effusion nor pneumothorax. | No effusion. | No pneumothorax.
    Although the heart is enlarged, there is no edema. | The heart is enlarged. | There is no edema.
    Opacity in the left base, compatible with pneumonia. | Opacity in the left base. | Pneumonia.
    Enlarged and tortuous aorta with cardiomegaly. | Enlarged and tortuous aorta. | Cardiomegaly.
    The aorta is tortuous and calcified. | The aorta is tortuous and calcified.
    Cardiomegaly, edema, and effusions are present. \
        | Cardiomegaly is present. | Edema is present. | Effusions are present.
    The lungs are clear without consolidation, effusion, or pneumothorax. \
        | The lungs are clear. | No consolidation. | No effusion. | No pneumothorax.
    Heart size and mediastinal contours are normal. \
        | Heart size is normal. | Mediastinal contours are normal.
    1. Possible atelectasis or pneumonia. 2. A 1.5 cm nodule. \
        | Possible atelectasis. | Possible pneumonia. | A 1.5 cm nodule.
    Aside from minimal atelectasis, the lungs are clear. \
        | Minimal atelectasis. | The lungs are clear.
    """))
def test_lists_are_split_into_one_entity_a_sentence(row):
    report, *sentences = row
    assert N.split_sentences(report) == sentences
    assert N.label_report(" ".join(sentences)) == N.label_report(report)


@pytest.mark.parametrize(("report", "cleaned"), cases("""
    Stable mild cardiomegaly. | Mild cardiomegaly.
    No new effusion. | No effusion.
    Compared to prior, no change. Small effusion. | Small effusion.
    The right effusion has increased in size since the prior exam. | The right effusion.
    The PICC line has been removed. | No PICC line.
    No change in the effusion. | Effusion.
    Pneumothorax is no longer seen. | No pneumothorax.
    No new or enlarging nodules. | No nodules.
    Stable chest. Comparison is made to the prior study dated XXXX. |
    The mediastinum is stable. Lungs are clear. | Lungs are clear.
    Stable enlargement of the heart. | Enlargement of the heart.
    The lungs remain clear. | The lungs are clear.
    Pacemaker in unchanged position. | Pacemaker.
    The lung volumes remain low. | The lung volumes are low.
    Heart size is stable and mildly enlarged. | Heart size is mildly enlarged.
    Nodules are unchanged and suggest granulomas. | Nodules suggest granulomas.
    There is an unchanged nodule and a new effusion. | There is a nodule and an effusion.
    Small effusions are unchanged bilaterally. | Small effusions bilaterally.
    AP chest compared to ___: Severe edema has worsened since earlier in the day. | Severe edema.
    In comparison with the study of ___, there is little change. Small effusion. | Small effusion.
    Mild edema, not changed from the prior radiograph of ___ at 5:04 a.m. | Mild edema.
    Small effusion, unchanged compared to the study performed one day earlier. | Small effusion.
    A small nodule is unchanged since 2012. | A small nodule.
    Slight interval decrease in right effusion since yesterday. | Right effusion.
    No change in the extent of the effusions. | Effusions.
    The opacity is slightly less conspicuous than on the prior study. | The opacity.
    Otherwise, there is no new effusion. | There is no effusion.
    Effusions, larger on the left. | Effusions, larger on the left.
    The opacity is less conspicuous. | The opacity.
    Opacity, new, more conspicuous on the left. | Opacity, more conspicuous on the left.
    There is now an NG tube. | There is an NG tube.
    Left nodule, not clearly seen on the prior study. | Left nodule.
    New moderate cardiomegaly since the prior radiograph. | Moderate cardiomegaly.
    There has been interval development of a right pneumothorax. | There is a right pneumothorax.
    The effusion is unchanged, and there is no pneumothorax. \
        | The effusion, and there is no pneumothorax.
    In comparison with the prior study, there is a new small left effusion. \
        | There is a small left effusion.
    Comparison is made to ___. Once again there are stable, small effusions. \
        | There are small effusions.
    """))
def test_comparison_with_priors_goes_and_the_finding_stays(report, cleaned):
    assert N.remove_temporal(report) == cleaned
    labels = N.label_report(report)
    assert N.label_report(cleaned) == (labels if cleaned else {})


@pytest.mark.parametrize(("report", "cleaned"), cases("""
    No pneumothorax, ETT in good position. | No pneumothorax. ETT in good position.
    There is increased opacity in the left base. | There is opacity in the left base.
    Right effusion is not appreciably changed. | Right effusion.
    Stable exam. | Stable exam.
    Normal lung vascularity and mild cardiomegaly. | Normal lung vascularity and mild cardiomegaly.
    The right internal jugular catheter has been removed, left PICC is unchanged. \
        | No right internal jugular catheter. Left PICC.
    """))
def test_clean_reports_keep_their_nouns_and_are_never_empty(report, cleaned):
    record = N.annotate({"id": "1", "report": report})
    assert record["report"] == cleaned
    assert record["labels"] == N.label_report(report)


@pytest.mark.parametrize(("report", "condition", "omitted"), cases("""
    Opacity in the right lung base represents atelectasis. | AT | Opacity in the right lung base.
    Fracture fixation hardware in the left humerus. | SD |
    Small nodule. CT is recommended for further evaluation of the nodule. Edema. | LL | Edema.
    Pneumonia. Follow-up films to ensure resolution of the pneumonia. Edema. | PN | Edema.
    Opacity in the left base. This may be artifact. Edema. | LO | Edema.
    Calcified right upper lobe nodule. | LL |
    Calcified pleural plaques. | PO |
    Calcified nodule causing an elevated right hemidiaphragm. | LL | Elevated right hemidiaphragm.
    Opacity consistent with small left effusion. | LO | Small left effusion.
    Monitor leads overlie a normal cardiac silhouette. | SD | Normal cardiac silhouette.
    Consolidation in the right upper lobe is consistent with pneumonia. | PN \
        | Consolidation in the right upper lobe.
    Opacity about a small patchy left basilar atelectasis. | LO \
        | Small patchy left basilar atelectasis.
    """))
def test_an_omission_takes_all_of_a_condition_and_leaves_no_half_of_a_place_or_noun(
        report, condition, omitted):
    assert N.omit(report, CODES[condition]) == (omitted or N.NOTHING_LEFT)
    past_a_comma = N.omit_from(["Opacity, left lower lobe, pneumothorax."], LO)
    assert past_a_comma == ["Pneumothorax."]


@pytest.mark.parametrize("condition", N.CONDITIONS[:-1])
def test_every_phrasing_of_a_denial_is_read_as_a_denial_of_that_condition_alone(condition):
    texts = {N.negate("", condition, random.Random(seed))[1] for seed in range(300)}
    assert len(texts) >= len(N.DENIALS.split(";"))
    for text in texts:
        assert N.label_report(text) == {condition: 0, NF: 1}, text


def test_an_omission_that_leaves_nothing_gives_a_sentence_without_findings():
    omitted, denied = N.negate("Cardiomegaly.", C, random.Random(0))
    assert omitted == N.NOTHING_LEFT and not N.mentions(omitted)
    assert N.NOTHING_LEFT not in denied and N.label_report(denied)[C] == 0
    [negative] = N.annotate({"id": "1", "report": "Cardiomegaly."})["hard_negatives"]
    assert negative["omitted"] == N.NOTHING_LEFT
    with pytest.raises(KeyError, match="No Finding"):  # the programmer's, it keeps its traceback
        N.negate("Lungs are clear.", NF, random.Random(0))


REPORT = ("Mild cardiomegaly. Left basilar opacity consistent with atelectasis. Small left "
          "effusion. Right chest tube. No pneumothorax.")


def test_annotate_is_a_pure_function_of_seed_and_id():
    record = {"id": "x/1", "report": "Stable " + REPORT[0].lower() + REPORT[1:], "site": "kept"}
    before = json.dumps(record)
    a, b = N.annotate(record), N.annotate(record)
    assert a == b and json.dumps(record) == before and a["site"] == "kept"
    assert a["report"] == REPORT and a["original_report"] == record["report"]
    assert N.annotate(a | {"report": "Edema."}) == a  # a second pass starts from the original
    assert sorted(n["condition"] for n in a["hard_negatives"]) == sorted(N.positives(a["labels"]))
    others = (N.annotate(record | {"id": f"x/{i}"})["hard_negatives"] for i in range(40))
    assert {n[0]["condition"] for n in others} == set(N.positives(a["labels"]))


def test_positions_are_where_they_say_and_each_is_drawn_often():
    places = Counter()
    for seed in range(60):
        for negative in N.annotate({"id": "1", "report": REPORT}, seed=seed)["hard_negatives"]:
            sentences = re.split(r"(?<=\.) ", negative["report"])
            at = [k for k, s in enumerate(sentences)
                  if N.label_report(s).get(negative["condition"]) == 0]
            place = "beginning" if at[0] == 0 else "middle"
            if at[-1] == len(sentences) - 1:
                place = "end"
            assert at == list(range(at[0], at[-1] + 1)) and negative["position"] == place
            places[place] += 1
    assert set(places) == {"beginning", "middle", "end"} and min(places.values()) > 60


@pytest.mark.parametrize(("condition", "report", "given", "labels"), [
    (C, "Cardiomegaly. Calcified granuloma.", None, {C: 0}),
    (C, "Cardiomegaly. Calcified granuloma.", {C: 1}, {C: 0}),
    (C, "Cardiomegaly. Possible pneumonia.", None, {C: 0, PN: -1}),
    (C, "Cardiomegaly. Possible pneumonia.", {C: 1}, {C: 0}),
    (C, "Cardiomegaly. Chest tube.", None, {C: 0, SD: 1, NF: 1}),  # devices are no abnormality
    (C, "Cardiomegaly. Chest tube.", {C: 1}, {C: 0, NF: 1}),
    (SD, "Cardiomegaly. Chest tube.", None, {C: 1, SD: 0}),
    (C, "Cardiomegaly. No effusion.", None, {C: 0, PE: 0, NF: 1}),
    (C, "Cardiomegaly. No effusion.", {C: 1}, {C: 0, NF: 1})])
def test_labels_of_a_hard_negative_have_one_zero_and_no_finding_is_what_its_own_text_says(
        condition, report, given, labels):
    negatives = N.annotate({"id": "1", "report": report}, labels=given)["hard_negatives"]
    [negative] = [n for n in negatives if n["condition"] == condition]
    assert negative["labels"] == labels
    assert N.label_report(negative["report"]).get(NF) == labels.get(NF)


def test_what_the_text_denies_or_doubts_or_does_not_say_makes_no_hard_negative():
    report = "No pleural effusion. Cardiomegaly. Pneumonia versus aspiration."
    for labels in (None, {PE: 1, C: 1, PT: 1}):
        record = N.annotate({"id": "1", "report": report}, labels=labels)
        assert [n["condition"] for n in record["hard_negatives"]] == [C]
    given = {C: 1, PN: -1, PE: 1}
    record = N.annotate({"id": "1", "report": "Cardiomegaly."}, labels=given)
    assert [n["labels"] for n in record["hard_negatives"]] == [given | {C: 0}]
    assert N.annotate({"id": "1", "report": "Lungs are clear."})["hard_negatives"] == []


@pytest.mark.parametrize("text", ["Cardiomegalia. Derrame pleural izquierdo.", "xyz", ""])
def test_a_text_that_is_not_understood_has_no_labels(text):
    assert N.label_report(text) == {} and N.annotate({"id": "1", "report": text})["labels"] == {}
    assert N.label_report(text + " Stable exam.") == {NF: 1}  # negative control


def test_hard_negatives_deny_one_condition_and_keep_the_others_in_any_mix_of_sentences():
    rng, seen = random.Random(0), set()
    for i in range(300):
        text = " ".join(report for report, _ in rng.sample(SENTENCES["causes"], 4))
        record = N.annotate({"id": str(i), "report": text})
        report = record["report"]
        stated = N.positives(N.label_report(report))
        assert stated == N.positives(N.label_report(text))
        for negative in record["hard_negatives"]:
            c = negative["condition"]
            seen.add(c)
            others = [other for other in stated if other != c]
            assert len(others) == len(stated) - 1, text
            pairs = [(negative["omitted"], negative["report"]), N.negate(report, c, rng)]
            for omitted, denied in pairs:
                assert c not in N.label_report(omitted) and N.label_report(denied)[c] == 0, text
                assert N.positives(N.label_report(omitted)) == others, text
                assert N.positives(N.label_report(denied)) == others, text
                assert omitted == N.omit(report, c) != report, text
            assert negative["graph"] == N.rule_graph(N._sentences(negative["report"])), text
    assert len(seen) >= 10


# ---- graphs
def entities(graph):
    words = graph["text"].split(" ")
    for e in graph["entities"].values():
        assert e["tokens"] == " ".join(words[e["start_ix"]:e["end_ix"] + 1])
        assert all(target in graph["entities"] for _, target in e["relations"])
    name = {key: e["tokens"] for key, e in graph["entities"].items()}
    return {(e["tokens"], e["label"]): {(relation, name[to]) for relation, to in e["relations"]}
            for e in graph["entities"].values()}


def test_a_rule_graph_follows_radgraphs_schema():
    graph = entities(N.annotate({"id": "1", "report": (
        "There is a small left pleural effusion. Patchy opacity in the right lower lobe suggestive "
        "of pneumonia. No pneumothorax. The heart is mildly enlarged.")})["graph"])
    assert graph["small", "OBS-DP"] == {("modify", "effusion")}
    assert graph["left", "ANAT-DP"] == {("modify", "pleural")}
    assert graph["effusion", "OBS-DP"] == {("located_at", "pleural")}
    assert graph["right", "ANAT-DP"] == {("modify", "lower")}
    assert ("suggestive_of", "pneumonia") in graph["opacity", "OBS-DP"]
    assert ("located_at", "lobe") in graph["opacity", "OBS-DP"]
    assert ("pneumonia", "OBS-U") in graph and ("pneumothorax", "OBS-DA") in graph
    assert graph["mildly", "OBS-DP"] == {("modify", "enlarged")}
    assert graph["enlarged", "OBS-DP"] == {("located_at", "heart")}


def denials_alone(reports):
    """{condition: the share of its denials with an absent node that no relation links}."""
    alone = {}
    for text, conditions in reports:
        for sentence in N._sentences(text):
            denied = [c for c, value in N._said([sentence]).items()
                      if value == 0 and c in conditions]
            if not denied:
                continue
            entities = N.rule_graph([sentence])["entities"]
            linked = {target for e in entities.values() for _, target in e["relations"]}
            nodes = [key not in linked and not e["relations"] for key, e in entities.items()
                     if e["label"] == "OBS-DA"]
            if nodes:
                for c in denied:
                    alone.setdefault(c, []).append(any(nodes))
    return {c: np.mean(values) for c, values in alone.items()}


def test_a_graph_does_not_tell_a_hard_negative_from_a_report():
    records = []
    for i in range(3000):  # the phantom's, without its drawings
        rng = np.random.default_rng((0, i))
        report = data._write_report(data._draw_findings(rng), rng)
        records.append(N.annotate({"id": str(i), "report": report}))
    known = {e["tokens"] for r in records for e in r["graph"]["entities"].values()}
    negatives = [n for r in records for n in r["hard_negatives"]]
    new = [n for n in negatives if {e["tokens"] for e in n["graph"]["entities"].values()} - known]
    assert len(new) <= 0.05 * len(negatives)

    originals = denials_alone((r["report"], N.CONDITIONS[:-1]) for r in records)
    denied = denials_alone((n["report"], [n["condition"]]) for n in negatives)
    assert len(originals.keys() & denied.keys()) >= 11
    for c in originals.keys() & denied.keys():
        assert abs(originals[c] - denied[c]) <= 0.1, (c, originals[c], denied[c])


def entity(tokens, label, at, *relations):
    return {"tokens": tokens, "label": label, "start_ix": at, "end_ix": at,
            "relations": [list(r) for r in relations]}


XL = {"text": "small pleural effusion . heart normal", "data_source": None, "entities": {
    "1": entity("small", "Observation::definitely present", 0, ("modify", "3")),
    "2": entity("pleural", "Anatomy::definitely present", 1),
    "3": entity("effusion", "Observation::definitely present", 2, ("located_at", "2")),
    "4": entity("normal", "Observation::definitely present", 5)}}


def test_given_graphs_keep_their_style_and_are_not_replaced():
    record = N.annotate({"id": "1", "report": "Pleural effusion. Heart normal.", "graph": XL})
    assert record["graph"] == XL
    edited = entities(record["hard_negatives"][0]["graph"])
    assert ("normal", "Observation::definitely present") in edited
    assert ("small", "Observation::definitely present") not in edited
    assert {label for (tokens, label) in edited if tokens in ("effusion", "fluid")} == {
        "Observation::definitely absent"}
    assert ("pleural", "Anatomy::definitely present") in edited  # of the denial
    assert N.annotate({"id": "1", "report": "Effusion.", "graph": XL})["graph"] == XL
    assert N.annotate({"id": "1", "report": "Effusion."})["graph"]["data_source"] == "rules"


def test_adjectives_and_relations_of_what_a_brought_graph_loses_go_with_it():
    graph = {"text": "mild patchy opacity . mild edema", "entities": {
        "1": entity("mild", "OBS-DP", 0), "2": entity("patchy", "OBS-DP", 1),
        "3": entity("opacity", "OBS-DP", 2), "4": entity("mild", "OBS-DP", 4, ("modify", "5")),
        "5": entity("edema", "OBS-DP", 5, ("suggestive_of", "3"))}}
    record = N.annotate({"id": "1", "report": "Mild patchy opacity. Mild edema.", "graph": graph})
    edited = {n["condition"]: n["graph"] for n in record["hard_negatives"]}[LO]
    kept = [e["tokens"] for e in edited["entities"].values() if e["label"] == "OBS-DP"]
    assert kept == ["mild", "edema"] and entities(edited)["edema", "OBS-DP"] == set()
    assert any(e["label"] == "OBS-DA" for e in edited["entities"].values())


# ---- files
def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def read(path):
    return [record for _, record in N.read_jsonl(path)]


def main(folder, records, *flags):
    """What negations.py, in this process, makes of the records."""
    source, out = write(folder / "in.jsonl", records), folder / "out.jsonl"
    N.main([str(source), "--out", str(out), "--workers", "1", *map(str, flags)])
    return read(out)


def test_radgraph_files_are_matched_by_study(tmp_path, capsys):
    records = [{"id": "mimic/51234567", "report": "Small pleural effusion."},
               {"id": "mimic/abd", "report": "Small pleural effusion.", "study_id": "51234567"},
               {"id": "mimic/abe", "report": "Small pleural effusion.", "study_id": "59999999"}]
    graphs = tmp_path / "graphs.json"
    graphs.write_text(json.dumps({"p10/p1/s50000000.txt": XL | {"text": "a b"},
                                  "p10/p10000001/s51234567.txt": XL}, indent=1))
    annotated = main(tmp_path, records, "--graphs", graphs)
    assert [r["graph"] == XL for r in annotated] == [False, True, False]
    assert re.search("graphs: not in the file, made by rule +2\n", capsys.readouterr().out)
    for text, message in (
            ('{"p10/p10000001/s51234567.txt": {"text": 5, "entities": {}}}',
             "in.jsonl:2: expected a RadGraph record with its text"),
            ("[]", "graphs.json(:1)?: expected"), ("{", "graphs.json(:1)?: expected")):
        graphs.write_text(text)
        with pytest.raises(UserError, match=message):
            main(tmp_path, records, "--graphs", graphs)


def test_a_record_may_bring_its_graph_also_under_a_key(tmp_path):
    records = [{"id": "1", "report": "Effusion.", "graph": g} for g in (XL, {"0": XL}, {})]
    assert [r["graph"] == XL for r in main(tmp_path, records)] == [True, True, False]


def manifest(path, studies=300):
    reports = [REPORT, "Lungs are clear.", "", "Stable cardiomegaly. Effusion.", "No edema."]
    return write(path, [{"id": f"made/{i}", "report": reports[i % 5] + f" Clip {i}."}
                        for i in range(studies)])


def start(source, out, workers):
    """negations.py as a process, which Ctrl-C can end also where it runs in the background."""
    words = [sys.executable, N.__file__, str(source), "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_output_is_byte_identical_for_any_number_of_workers(tmp_path):
    source = manifest(tmp_path / "in.jsonl")
    process = start(source, tmp_path / "3.jsonl", 3)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    for seed in ("0", "1"):
        N.main([str(source), "--out", str(tmp_path / seed), "--workers", "1", "--seed", seed])
    one, other, three = (tmp_path.joinpath(name).read_bytes() for name in ("0", "1", "3.jsonl"))
    assert one == three and one.count(b"\n") == 300
    assert other != one  # negative control
    assert "studies" in printed and "Clip" not in printed + errors  # no report text
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_run_leaves_the_old_output(tmp_path):
    source, out = manifest(tmp_path / "in.jsonl", 20_000), tmp_path / "out.jsonl"
    out.write_text("old")
    process = start(source, out, 1)
    while process.poll() is None and len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130 and out.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


NODE = XL["entities"]["2"]
NOT_GRAPHS = [  # of a record, and what was expected
    ([], "graph as dict"), ("", "graph as dict"), (False, "graph as dict"), ([1], "graph as dict"),
    *((graph, "a RadGraph record") for graph in (
        {"0": []}, {"0": {"0": XL}}, {"text": "a", "entities": []})),
    *((graph, "with its text") for graph in ({"entities": {}}, {"text": 5, "entities": {}})),
    *((XL | {"entities": {"SECRET": node}}, "entity 1: exp") for node in (
        NODE | {"relations": [["modify", "SECRET2"]]}, NODE | {"relations": "SECRET"}, "SECRET")),
    (XL | {"entities": {"1": NODE, "SECRET": NODE | {"label": ["SECRET"]}}}, "entity 2: exp"),
    (XL | {"entities": {"1": NODE, "SECRET": {"tokens": "SECRET", "label": "OBS-U"}}},
     "entity 2: expected start_ix and relations")]


def test_mistakes_name_file_and_line_and_show_no_report(tmp_path):
    good = json.dumps({"id": "1", "report": "SECRET effusion."})
    source, out = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    wrong = {"id": "SECRET", "report": "SECRET"}
    bad_lines = [
        ("{SECRET", "JSON object"), ('["SECRET"]', "JSON object"), ("\xff", "object in UTF-8"),
        *((json.dumps(wrong | {"graph": graph}), expected) for graph, expected in NOT_GRAPHS),
        *((json.dumps(record), expected) for record, expected in (
            (wrong | {"id": 5}, "id, report as texts"), ({"id": "1"}, "an object with id, report"),
            (wrong | {"id": "cxr-align/1"}, "another set than CXR-Align"),
            (wrong | {"labels": {"Heart": 1}}, "conditions among Enlarged"),
            (wrong | {"labels": {C: 2}}, "labels out of"),
            (wrong | {"report": ["SECRET"]}, "id, report as texts"),
            (wrong | {"original_report": None}, "original_report as str")))]
    for bad, expected in bad_lines:
        source.write_bytes(f"{good}\n\n{bad}\n".encode("latin-1"))
        with pytest.raises(UserError, match=f"^{source}:3: ") as caught:
            N.main([str(source), "--out", out, "--workers", "1"])
        message = str(caught.value)
        assert expected in message and "SECRET" not in message and "\n" not in message
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]  # nothing is left
    source.write_text(good + "\n")
    for words, expected in (
            ([source, "--out", tmp_path], "expected a regular file"),
            ([source, "--out", source], "--out .*: expected another file than the one"),
            ([tmp_path / "none.jsonl", "--out", out], "none.jsonl"),
            ([source, "--out", out, "--labeler", "chexbert"], "--chexbert CKPT")):
        with pytest.raises(UserError, match=expected):
            N.main([str(word) for word in words])
    assert source.read_text() == good + "\n"


def test_labels_of_the_manifest_can_be_given(tmp_path, capsys):
    labels = {C: 1, PN: 1, PT: 1}
    [record] = main(tmp_path, [{"id": "1", "report": "Cardiomegaly. Effusion.", "labels": labels}],
                    "--labeler", "given")
    assert record["labels"] == labels
    assert [(n["condition"], n["labels"]) for n in record["hard_negatives"]] == [
        (C, labels | {C: 0})]
    assert re.search("does not state: no negative +2\n", capsys.readouterr().out)
    records = main(tmp_path, [{"id": "1", "report": "Edema."},
                              {"id": "2", "report": "Edema.", "labels": {}}], "--labeler", "given")
    assert [record["labels"] for record in records] == [{ED: 1}] * 2
    assert re.search("labels: not given, made by rule +2\n", capsys.readouterr().out)


@pytest.mark.parametrize(("strange", "warned"), [(1, False), (2, True)])
def test_texts_that_are_not_understood_are_counted_and_warned_about(
        tmp_path, capsys, strange, warned):
    reports = ["Derrame pleural."] * strange + ["Lungs are clear."] * (20 - strange)
    main(tmp_path, [{"id": str(i), "report": report} for i, report in enumerate(reports)])
    printed = capsys.readouterr().out
    assert re.search(f"not understood +{strange}\n", printed)
    assert re.search(f"of No Finding +{20 - strange}\n", printed)
    assert ("the rules read English" in printed) == warned


# ---- models
SIZES = dict(vocab_size=10, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
             intermediate_size=32, max_position_embeddings=24)


@pytest.fixture(scope="module")
def chexbert(tmp_path_factory):
    """A randomly initialised checkpoint with the published one's keys: (path, its parameters)."""
    import torch
    from transformers import BertConfig, BertModel
    folder = tmp_path_factory.mktemp("chexbert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] no pneumo ##thorax effusion .".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES))
    heads = torch.nn.ModuleList(torch.nn.Linear(64, n) for n in [4] * 13 + [2])
    state = {f"module.bert.{k}": v for k, v in bert.state_dict().items()}
    state |= {f"module.linear_heads.{k}": v for k, v in heads.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(24)[None]
    path = folder / "chexbert.pth"
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    return path, state, bert.eval(), heads


def test_chexbert_gives_the_argmax_of_each_head_whatever_the_batch(chexbert):
    import torch
    path, _, bert, heads = chexbert
    texts = ["No pneumothorax.", "", "Effusion " * 50, "effusion . no", "no no no"]
    labeler = N.CheXbert(path, **SIZES)
    labels = labeler(texts)
    assert labels == [labeler([text])[0] for text in texts]
    ids = torch.tensor([[2, 5, 6, 7, 9, 3]])  # [CLS] no pneumo ##thorax . [SEP]
    with torch.inference_mode():
        cls = bert(ids).last_hidden_state[:, 0]
        classes = [int(head(cls).argmax()) for head in heads]
    meaning = {1: 1, 2: 0, 3: -1}  # 0 is blank
    assert labels[0] == {c: meaning[k] for c, k in zip(N.CONDITIONS, classes, strict=True) if k}
    assert len(set(map(str, labels))) > 1  # negative control: the text matters


def test_chexbert_is_strict_about_its_checkpoint_and_its_vocabulary(chexbert, tmp_path):
    import torch
    path, state, *_ = chexbert
    bad, vocabulary = tmp_path / "bad.pth", tmp_path / "vocab.txt"
    words = (path.parent / "vocab.txt").read_text()
    vocabulary.write_text(words)
    last = "module.linear_heads.13.bias"
    for weights, sizes in (({name: state[name] for name in state if name != last}, {}),
                           (state | {last: torch.zeros(5)}, {}), (os.system, {}),
                           (state | {"module.extra": torch.zeros(1)}, {}),
                           (state, {"num_hidden_layers": 1})):
        torch.save({"model_state_dict": weights}, bad)
        with pytest.raises(UserError, match="CheXbert's weights"):
            N.CheXbert(bad, **SIZES | sizes)
    N.CheXbert(bad, **SIZES)  # negative control: the last, with its own sizes
    for spoil in (lambda: vocabulary.write_text(words + "lung\n"), vocabulary.unlink):
        spoil()
        with pytest.raises(UserError, match="vocab.txt: expected"):
            N.CheXbert(bad, **SIZES)
    bad.write_bytes(bad.read_bytes()[:1000])
    with pytest.raises(UserError, match="CheXbert's weights"):
        N.CheXbert(bad, **SIZES)


def test_chexbert_labels_a_manifest(chexbert, tmp_path, monkeypatch):
    monkeypatch.setattr(N, "CheXbert", functools.partial(N.CheXbert, **SIZES))
    records = main(tmp_path, read(manifest(tmp_path / "in.jsonl", 70)),
                   "--labeler", "chexbert", "--chexbert", chexbert[0])
    assert [r["labels"] for r in records] == N.CheXbert(chexbert[0])(
        [r["report"] for r in records])


@pytest.mark.parametrize("text", [
    "effusion and heart " * 7000, "heart and " * 1500, "effusion, " * 1500, "the lungs " * 2000,
    "stable compared to the " * 800, "normal heart size and " * 700,
    "opacity may represent atelectasis or pneumonia with " * 300,
    "\u0130 effusion \u1e9e " * 200, "1. " * 3000, "effusion\x00 \u2028 edema"])
def test_hostile_reports_end_soon(text):
    began = time.perf_counter()
    N.annotate({"id": "1", "report": text})
    assert time.perf_counter() - began < 5


def test_the_code_calls_no_cloud():
    code = (ROOT / "negations.py").read_text()
    assert not re.search(r"https?://|\burllib|\brequests\b|\bsocket\b|api_key", code)


# ---- OpenI: what is measured on real reports
SHARED = {  # condition: its columns of the human MeSH table
    AT: ["Atelectasis"], C: ["Cardiomegaly"], PE: ["Effusion"], LL: ["Mass", "Nodule"],
    PN: ["Pneumonia"], PT: ["Pneumothorax"], CO: ["Consolidation"], ED: ["Edema"],
    PO: ["Pleural Thickening"], NF: ["normal"]}


def openi():
    """OpenI's studies: (uid, findings + impression, MeSH row, public labeler's row)."""
    def table(name):
        with open(OPENI / name, encoding="utf-8-sig", newline="") as file:
            return {row["uid"]: row for row in csv.DictReader(file)}
    mesh, public = table("labels_mesh.csv"), table("labels_chexpert_labeler.csv")
    return [(uid, f"{row['findings']} {row['impression']}".strip(), mesh[uid], public[uid])
            for uid, row in table("indiana_reports.csv").items()]


def held_out(uid):
    """A third of the studies that nobody looked at while the rules were written."""
    return hashlib.sha1(f"holdout{uid}".encode()).digest()[0] % 3 == 0


def scores(studies, positive):
    """{condition: (precision, recall, F1, n)}, micro and macro F1; positive(study) -> names."""
    said = [positive(study) for study in studies]
    rows, all_right, all_wrong = {}, 0, 0
    for c, columns in SHARED.items():
        true = {i for i, study in enumerate(studies) if any(study[2][k] == "1" for k in columns)}
        found = {i for i, names in enumerate(said) if c in names}
        right, wrong = len(true & found), len(true ^ found)
        rows[c] = (right / max(1, len(found)), right / max(1, len(true)),
                   2 * right / max(1, 2 * right + wrong), len(true))
        all_right += right
        all_wrong += wrong
    micro = 2 * all_right / (2 * all_right + all_wrong)
    return rows, micro, sum(f for _, _, f, _ in rows.values()) / len(rows)


def ours(study):
    return {c for c, v in N.label_report(study[1]).items() if v}


def public(study):
    return {c for c, v in study[3].items() if v in ("1", "-1")}


@needs_openi
def test_openi_labels_beat_the_public_labeler_also_on_reports_never_looked_at():
    for keep in (lambda uid: True, held_out):
        studies = [s for s in openi() if keep(s[0])]
        _, micro, macro = scores(studies, ours)
        _, their_micro, their_macro = scores(studies, public)
        assert micro >= 0.86 and macro >= 0.77, (micro, macro)
        assert micro > their_micro + 0.1 and macro > their_macro + 0.1


def pipeline_counts():
    """What happens to OpenI's reports on their way through annotate()."""
    n = Counter()
    for uid, text, *_ in openi():
        if not text:
            continue
        record = N.annotate({"id": f"openi/{uid}", "report": text})
        before, after = N.label_report(text), N.label_report(record["report"])
        n["pairs"] += len(N.CONDITIONS)
        n["agree"] += sum(before.get(c) == after.get(c) for c in N.CONDITIONS)
        said = set(before) | set(after)
        n.update(said=len(said), said_agree=sum(before.get(c) == after.get(c) for c in said))
        n["reports"] += 1
        n["graphs"] += any(e["label"][:3] == "OBS" for e in record["graph"]["entities"].values())
        n["missing"] += len(N.positives(after)) - len(record["hard_negatives"])
        for negative in record["hard_negatives"]:
            c, rr, rn = (negative[k] for k in ("condition", "omitted", "report"))
            n["negatives"] += 1
            n["gone"] += c not in N.label_report(rr)
            n["denied"] += N.label_report(rn).get(c) == 0
            n["unchanged"] += record["report"] in (rr, rn)
            n["nothing left"] += rr == N.NOTHING_LEFT
            others = set(N.positives(after)) - {c}
            n["others"] += len(others)
            for text in (rr, rn):
                others &= set(N.positives(N.label_report(text)))
            n["kept"] += len(others)
            n["true"] += N.label_report(rn).get(NF) == negative["labels"].get(NF)
    return n


@needs_openi
def test_openi_clean_up_changes_no_label_and_hard_negatives_are_what_they_say():
    n = pipeline_counts()
    assert n["said_agree"] >= 0.98 * n["said"] > 0
    assert n["gone"] >= 0.98 * n["negatives"] and n["denied"] >= 0.98 * n["negatives"] > 0
    assert n["kept"] >= 0.95 * n["others"] > 0
    assert n["unchanged"] == n["missing"] == 0
    assert n["graphs"] >= 0.95 * n["reports"]
    assert n["true"] == n["negatives"]  # No Finding is what the text says


def measure():
    """Prints everything that the README states about OpenI."""
    began, studies = time.perf_counter(), openi()
    for uid, text, *_ in studies:
        json.dumps(N.annotate({"id": uid, "report": text}))
    speed = len(studies) / (time.perf_counter() - began)
    (mine, *m), (theirs, *t) = scores(studies, ours), scores(studies, public)
    print("| condition | n | rules: P | R | F1 | CheXpert labeler: P | R | F1 |")
    print("|---|---|---|---|---|---|---|---|")
    for c in SHARED:
        cells = " | ".join(f"{x:.2f}" for x in (*mine[c][:3], *theirs[c][:3]))
        print(f"| {c} | {mine[c][3]} | {cells} |")
    for name, a, b in zip(("micro", "macro"), m, t, strict=True):
        print(f"| **{name}** | | | | **{a:.3f}** | | | {b:.3f} |")
    rest = [s for s in studies if held_out(s[0])]
    print("\nthe {} held-out studies: ours {:.3f} / {:.3f}, public {:.3f} / {:.3f}".format(
        len(rest), *scores(rest, ours)[1:], *scores(rest, public)[1:]))
    n = pipeline_counts()
    for what, part, whole in (
            ("labels agree before and after clean-up", "agree", "pairs"),
            ("  of the pairs that one of them mentions", "said_agree", "said"),
            ("condition gone from r^r", "gone", "negatives"),
            ("condition denied in r^n", "denied", "negatives"),
            ("other positive conditions kept in both", "kept", "others"),
            ("No Finding is what r^n says", "true", "negatives"),
            ("r^r or r^n is r unchanged", "unchanged", "negatives"),
            ("r^r is empty", "nothing left", "negatives"),
            ("graph with an observation", "graphs", "reports")):
        print(f"{what:42s} {100 * n[part] / n[whole]:6.2f} %  of {n[whole]:,}")
    print(f"{'studies per second, one core, cold':42s} {speed:6,.0f}")
    for section in ("general", "hard"):
        print(f"{section + ' sentences fully right':42s} {100 * share_right(section):6.1f} %")


if __name__ == "__main__":
    measure()
