"""Labels, clean reports, hard negatives and graphs of chest X-ray reports (Sec. 3, 4.1, Fig. 2).

    python negations.py IN.jsonl --out OUT.jsonl     (--labeler, --graphs: see --help)

Fig. 2 as a local pipeline: a report r is split into sentences of one clinical entity without
comparison to priors; its positive conditions are found; for each of them the sentences about it are
removed (r^r, `omit`) and a denial is put at the beginning, middle or end (r^n, `negate`). Rules do
all of it; CheXbert, if you have it, may replace the labeler. Labels: 1 present, 0 denied, -1
uncertain.

In this order: the pipeline, omission and denial, splitting and clean-up, what a sentence says,
graphs, CheXbert, files, and last the tables, which are written in words.

SPDX-License-Identifier: MIT
"""
import argparse
import functools
import itertools
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import (
    CONDITIONS,
    UserError,
    check_graph,
    check_record,
    expect,
    minimum,
    open_atomic,
    open_file,
    parallel,
    read_json,
    read_jsonl,
    run_main,
)

PRESENT, DENIED, UNCERTAIN = 1, 0, -1
OTHER = "Other"  # abnormal, outside the 14: cancels No Finding
# ASSUMPTION: if omission leaves nothing, r^r is this sentence, which names no finding.
NOTHING_LEFT = "Frontal chest radiograph."
cached = functools.lru_cache(32768)  # the same sentences come again and again


def annotate(record, *, seed=0, labels=None):
    """Fig. 2 for one record of a manifest; pure, deterministic in (seed, record["id"]).

    record: dict with id, report and, if it was brought, graph (RadGraph's; else it is made by
    rule). labels: the cleaned report's; None is `label_report`.
    Returns the record with report (cleaned), original_report, labels, graph and hard_negatives: one
    per positive condition that the rules find in the text, CXR-Align's choice first (Sec. 3).
    """
    rng = random.Random(f"{seed}/{record['id']}")

    # (i) one clinical entity a sentence, without comparison to earlier examinations
    sentences = clean(record)
    report = " ".join(sentences)
    if labels is None:
        labels = label_report(report)
    graph = record.get("graph") or {}
    brought = graph and graph.get("data_source") != "rules"  # that an earlier run made
    if not brought:
        graph = rule_graph(sentences)

    # each positive entity, in random order: the paper takes one of them, training draws one anew
    negatives, conditions = [], positives(labels)
    for condition in rng.sample(conditions, len(conditions)):
        # (ii) r^r: the sentences related to the entity removed
        rest = omit_from(sentences, condition)
        if rest == sentences or _said(sentences).get(condition) == DENIED:
            continue  # labels from elsewhere, of which the text says nothing or the contrary
        # r^n: its negation at the beginning, in the middle or at the end
        negated, denial, position = deny(rest, condition, rng)
        negatives.append({
            "condition": condition,
            "omitted": " ".join(rest) or NOTHING_LEFT,
            "report": " ".join(negated),
            "position": position,
            "labels": negated_labels(labels, condition, negated),
            "graph": negated_graph(graph, condition, denial) if brought else rule_graph(negated),
        })
    return record | {
        "report": report, "original_report": record.get("original_report", record["report"]),
        "labels": labels, "graph": graph, "hard_negatives": negatives}


def negated_labels(labels, condition, sentences):
    """r^n's labels: r's, the condition denied; No Finding if these and its text hold no finding."""
    # ASSUMPTION: r^n's labels are r's, edited for the one condition, whoever made them.
    labels = with_no_finding(labels | {condition: DENIED})
    if "No Finding" not in with_no_finding(_said(sentences)):
        labels.pop("No Finding", None)
    return labels


def clean(record):
    """Sentences of one clinical entity each, without comparison to earlier examinations."""
    text = record.get("original_report", record["report"])
    return split_sentences(remove_temporal(text)) or split_sentences(text)  # not "Stable chest."


# ---------------------------------------------------------------- omission and denial (Sec. 3, 4.1)


def omit(text, condition):
    """r^r: the report without the sentences about the condition, affirmed or denied (Sec. 3)."""
    return " ".join(omit_from(split_sentences(text), condition)) or NOTHING_LEFT


def negate(text, condition, rng):
    """(r^r, r^n) of a cleaned report: the condition omitted, and denied somewhere (Sec. 3, Fig. 2).

    condition: one of the 13 besides No Finding. rng: random.Random or numpy's Generator.
    """
    rest = omit_from(split_sentences(text), condition)
    negated, *_ = deny(rest, condition, rng)
    return " ".join(rest) or NOTHING_LEFT, " ".join(negated)


def omit_from(sentences, condition):
    """The sentences without what concerns the condition."""
    kept, gone = [], False
    for sentence in sentences:
        if gone and _REFERS.match(sentence) and not mentions(sentence):
            continue  # "This may represent contusion", of what was omitted
        pieces = _omit(sentence, condition)
        gone = not pieces
        kept += pieces
    return kept


@cached
def _omit(sentence, condition):
    """What remains without the condition: other findings of the sentence become noun phrases."""
    if condition not in {m.condition for m in all_mentions(sentence)}:
        return (sentence,)
    kept = []
    for other, value in _said([sentence]).items():
        if other == condition or (other == OTHER and value == DENIED):
            continue
        phrases = [sentence[_noun(sentence, m)] for m in mentions(sentence) if m.condition == other]
        for phrase in [*phrases, *_phrases(NOUNS.get(other, ""))]:
            piece = _state(value, phrase)
            says = {m.condition: m.value for m in all_mentions(piece)}
            half = _BARE.fullmatch(piece) or _HALF.search(piece)
            if says.get(other) == value and condition not in says and not half:
                kept.append(piece)
                break  # the first that says the one thing without the other
    return tuple(kept)


def deny(sentences, condition, rng):
    """A denial, of one entity a sentence, put among sentences: (all, the denial, its position)."""
    denial = _draw(_phrases(NOUNS[condition]), rng)
    if denial.islower():  # a noun
        denial = _draw(_phrases(DENIALS), rng).format(denial)
    denial = split_sentences(denial)
    places = {"beginning": [0]}
    if sentences:
        places["end"] = [len(sentences)]
    if len(sentences) > 1:
        places["middle"] = range(1, len(sentences))
    position = _draw(list(places), rng)
    place = _draw(places[position], rng)
    return [*sentences[:place], *denial, *sentences[place:]], denial, position


def _draw(items, rng):
    """One of the items; random.Random and numpy's Generator draw in this one way alike."""
    return items[int(rng.random() * len(items))]


# ---------------------------------------------------------------- splitting, clean-up (Fig. 2, i)
# An edit of a sentence is kept only if its labels stay the same, so that splitting and clean-up
# cannot change what a report says.

_WORD = re.compile(r"[\w'/.-]*\w")
_BREAK = re.compile(r"(?<=[.!?])(?<!\bDr\.)(?<!\bvs\.)(?<!^\?)(?<!\s\?)\s+|"
                    r"(?<=[a-z]{2}[.])(?=[A-Z])|(?<=;)\s+|"
                    r"\s(?=\d{1,2}[.)] [A-Z]|(?:FINDINGS|IMPRESSION)\s?:)")
_HEADING = re.compile(r"^[^\w?]*(?:\d{1,2}[.)](?!\d)\s*)?"
                      r"(?:(?:findings|impression|(?:[ap]{2} )?chest)\s*:\s*)?", re.I)
_CHUNK = re.compile(r"(?:\S+ ?){1,100}")  # words; no sentence has more, and time is bounded
_CONJUNCTION = re.compile(
    r"(?<!compatible)(?<!consistent)(?<!keeping)(?<!associated)(?<!along),?\s+(?:(?=without\b)|"
    r"(?:and/or|and|or|nor|versus|vs\.?|with|but|however|although|while|as well as)\b,?\s+)")
_COMMA = re.compile(r"[,;]\s+")
_LEAD = re.compile(r"^(?:(?:and|but|or|which|is|are|of|although|though|while|however|otherwise|"
                   r"aside from|apart from|except for|other than|(?:compatible|consistent) with|"
                   r"(?:could|may|might) (?:also )?(?:reflect|represent|be)|suggesting)"
                   r"\b[\s,;:./-]*|[\s,;:./-]+)+(?=\S)", re.I)  # not "<" of "<1 cm", nor "("
_BARE = re.compile(r"\W*\w+(?:ed|ous|ic|ent|ive|ary)\W*(?:$|(?:and|or|but)\b)", re.I)  # no noun
_HALF = re.compile(r"(?<!\b[ot][no] the )(?<!\b[ot][no] )\b(?:right|left|upper|lower|middle|mid|"
                   r"costophrenic|cardiophrenic)\W*$", re.I)  # the noun of a place is missing
_REFERS = re.compile(r"(?:this|these|it|its|they|which|the (?:largest|tip))\b", re.I)
_PLACE_LIST = re.compile(  # "heart size and mediastinal contours are normal"
    r"^(?P<lead>(?:the |both |normal |unremarkable )*)"
    r"(?P<places>[\w\s,/-]+?,? and (?:the )?[\w\s-]+?)"
    r"(?P<tail>(?:\s(?:are|is|appears?|remains?|within|grossly|normal|unremarkable|clear)\b"
    r"[^,;]*)?)$",
    re.I)
_ADJECTIVE = re.compile(r"(?i)(?:cardiac|[a-z]*mediastinal|hilar|pulmonary|pleural|osseous|bony)$")
_VERB = re.compile(r"\b(?:is|are|there|no|without|with|of)\b")


def split_sentences(text):
    """Sentences of one clinical entity each, where rules can cut lists and the like (Sec. 3)."""
    # DIFFERS from Sec. 3: rules split and omit, where the paper asks Gemini.
    return [piece for sentence in _sentences(text) for piece in _split(sentence)]


def remove_temporal(text):
    """The report without comparison to prior examinations; findings and labels stay (Sec. 3)."""
    sentences = (_timeless(sentence) for sentence in _sentences(text))
    return " ".join(sentence for sentence in sentences if sentence)


@cached
def _sentences(text):
    """The sentences of a text as they stand, without numbers and headings."""
    pieces = []
    for piece in _BREAK.split(" ".join(text.split())):
        pieces += _CHUNK.findall(piece[_HEADING.match(piece).end():])
    return tuple(piece.strip() for piece in pieces if _WORD.search(piece))


def _finish(piece):
    """A piece of a sentence as a sentence."""
    piece = piece.strip(" ,;:-.")
    return piece[:1].upper() + piece[1:] + "." if piece else ""


def _state(value, phrase):
    """A noun phrase as a sentence that states, denies or doubts it."""
    if value in {m.value for m in mentions(phrase)}:  # also "normal heart size", which denies
        return _finish(phrase)
    phrase = re.sub("(?i)^(?:there (?:is|are)|either) ", "", phrase)
    if phrase[1:2].islower():  # not "PICC"
        phrase = phrase[:1].lower() + phrase[1:]
    return _finish(("No " if value == DENIED else "Possible ") + phrase)


@cached
def _split(sentence):
    """One entity a sentence, where a list or a conjunction can be cut."""
    pieces = [sentence]
    for cut in (_cut_places, _cut_findings):
        smaller = cut(pieces[0])
        whole = smaller and not any(_HALF.search(piece) for piece in smaller[:-1])
        if whole and _said(smaller) == _said([sentence]):
            pieces = smaller
        if len(pieces) > 1:
            return tuple(itertools.chain.from_iterable(map(_split, pieces)))
    return (_finish(pieces[0]),)


def _cut_places(sentence):
    """"Heart size and mediastinal contours are normal" -> a sentence for each of the places."""
    match = _PLACE_LIST.match(sentence.strip(" ."))
    if not match or not (match["tail"] or re.search("normal|unremark", match["lead"], re.I)):
        return []
    places = re.split(r",[,\s]*(?:and\s+)?|\s+and\s+", match["places"].strip())
    if any(len(place.split()) > 4 or _VERB.search(place) for place in places):
        return []
    if match["lead"] and any(map(mentions, places)):  # "normal vascularity and cardiomegaly"
        return []
    noun = places[-1].split()[-1]
    tail = match["tail"]
    pieces = []
    for place in places:
        place = match["lead"] + place.removeprefix("the ")
        if _ADJECTIVE.search(place):
            place += f" {noun}"
        plural = re.search("[^su]s$", place)
        verb = tail if plural else tail.replace(" are", " is").replace(" appear ", " appears ")
        pieces.append(_finish(place + verb))
    return pieces


def _cut_findings(sentence):
    """A sentence for each of the findings between which a conjunction or a comma stands."""
    pieces, begin = [], 0
    for before, after in itertools.pairwise(mentions(sentence)):
        between = (sentence, before.end, after.start + 1)  # a letter more, for lookaheads
        gap = _CONJUNCTION.search(*between) or _COMMA.search(*between)
        if not gap or gap.start() <= begin or gap.end() > after.start:
            continue
        bare = _BARE.fullmatch(sentence, begin, gap.start()) or _BARE.match(sentence, gap.end())
        if not bare:
            pieces.append(_piece(sentence, begin, gap.start()))
            begin = gap.end()
    return [*pieces, _piece(sentence, begin, len(sentence))]


def _piece(sentence, start, end):
    """sentence[start:end] as a sentence, which says itself what a cue before it said of it."""
    piece = _LEAD.sub("", sentence[start:end].strip(" ,;."))
    piece = re.sub(r"(?i)^without\b|\bneither\b", "no", piece)
    values = {m.value for m in mentions(sentence) if start <= m.start < end}
    if len(values) == 1 and values != {m.value for m in mentions(piece)}:
        return _state(values.pop(), piece)
    return _finish(piece)


_GONE = re.compile(r"\b(?:removal|resolution|clearing) of|\bha(?:s|ve|d) (?:been |since )*(?:"
                   r"removed|resolved|cleared)|\bno longer\b", re.I)
_REPAIRS = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?i)\b(no|the|an?|there (?:is|are)|(?:is|are)(?= and (?:\w+ly|\w+ed|within|normal|most)\b))"
     r"(?: ?,| and| or| but)(?= )", r"\1"),  # "no new or enlarging nodules"
    (r"(?i)\b(?:is|are)(?: and\b|(?= but| bilaterally))", " "),
    (r"\b([Aa])(?= (?!one)[aeio])", r"\1n"),
    (r"\b([Aa])n(?= [b-df-gj-np-tv-z])", r"\1")))
_REST = re.compile(r"(?:\b(?:is|are|has|have|been|appears?|there|to|be|and|but|with|of|in|or|also|"
                   r"which)\b\W*)+$|\s+(?:(?:is|are|has|have) ?)?(?=[,.;])|,\s*(?=[,.;]|$)", re.I)


@cached
def _timeless(sentence):
    """The sentence without comparison to priors, piece by piece if need be; "" if nothing else."""
    edited = _cut_time(sentence)
    if edited == sentence or _said(_sentences(edited)) == _said([sentence]):
        return edited
    pieces = []
    for piece in _split(sentence):
        edited = _cut_time(piece)
        same = _said(_sentences(edited)) == _said([piece])
        pieces.append(edited if same else piece)
    return " ".join(filter(None, pieces))


def _cut_time(sentence):
    mentioned = mentions(sentence)
    text = sentence
    if _GONE.search(text) and any(m.value == DENIED for m in mentioned):
        text = " ".join(_state(m.value, text[_noun(text, m)]) for m in mentioned)
    for phrases, replacement in TIME.items():
        text = matcher(phrases).sub(replacement, text)
    vague = "empty"
    if text != sentence:
        text, vague = _repair(text), "leftover"
    if not mentioned and all(_is(vague, word) for word in _WORD.findall(text)):
        return ""
    return _finish(text)


def _repair(text):
    """Grammar, where words were taken out."""
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, " ".join(text.split()))
    trimmed = (_REST.sub("", piece.strip(" ,;.")) for piece in _sentences(text))
    return " ".join(_finish(_LEAD.sub("", piece)) for piece in trimmed)


_ITS_NOUN = re.compile(r"(?<=ed|us|ic|nt|ve)(?: and \w+)?(?: (?!with|and|or|in|of|is|are)[\w-]+)"
                       r"{1,2}")


def _noun(sentence, mention):
    """The finding with the side, grade and place words around it, as a slice of the sentence."""
    start, end = mention.start, mention.end
    near = max(0, start - 100)  # seven words; a sentence may be a whole report
    before = matcher("<place>|<grade> [<place>|<grade>]+ .").search(sentence, near, start)
    if before:
        start = before.start()
    tails = matcher("<located>").match(sentence, end + 1), _ITS_NOUN.match(sentence, end)
    return slice(start, max([end, *(tail.end() for tail in tails if tail)]))


# ---------------------------------------------------------------- what a sentence says (Sec. 4.2)


class Mention(NamedTuple):
    """A finding in a sentence."""
    start: int      # its first character
    end: int        # the first one behind it
    condition: str  # one of the 13, or OTHER
    value: int      # PRESENT, DENIED, UNCERTAIN; None: nothing is said


def label_report(text):
    """CheXpert labels of a report by rules: {condition: 1 | 0 | -1}, absent = not mentioned.

    Each sentence is read alone. The phrases of FINDINGS are looked up; some deny or hedge by
    themselves ("heart size is normal"), on the others CUES act, in a scope that ends at words like
    "but" and at a comma before a new statement. No Finding is 1 if no abnormality, of the 14 or
    not, is present or uncertain (support devices aside), else absent. A text that is not
    `understood` has no labels: {}.
    """
    # DIFFERS from Sec. 4.2: labels come from rules, unless --labeler chexbert or given.
    return with_no_finding(_said(_sentences(text))) if understood(text) else {}


def understood(text):
    """Whether a phrase of the tables is in it, a finding's or one of normality."""
    found = any(map(all_mentions, _sentences(text)))
    return found or matcher("<healthy>").search(text) is not None


def positives(labels):
    """Names among the 13 conditions besides No Finding whose value is 1, in CheXbert's order."""
    return [c for c in CONDITIONS[:-1] if labels.get(c) == PRESENT]


def _said(sentences):
    """Labels of sentences, OTHER among them: present beats uncertain beats denied."""
    labels = {}
    for sentence in sentences:
        for m in mentions(sentence):
            if m.value == PRESENT or not labels.get(m.condition):
                labels[m.condition] = m.value
    return labels


def with_no_finding(labels):
    """Labels in CheXbert's order; No Finding is 1 if nothing but devices and denials is there."""
    ordered = {c: labels[c] for c in CONDITIONS[:-1] if c in labels}
    if not any(labels[c] for c in labels.keys() - {"Support Devices", "No Finding"}):
        ordered["No Finding"] = PRESENT
    return ordered


def mentions(sentence):
    """The findings of a sentence of which something is said, by position, as `Mention`s."""
    return [m for m in all_mentions(sentence) if m.value is not None]


def all_mentions(sentence):
    """All findings of a sentence, value None where nothing is said ("CT to look for a nodule")."""
    lower = sentence.replace("\u0130", "I").lower()  # the one capital that becomes two letters
    return _mentions(lower.rstrip(" ."))


@cached
def _mentions(lower):
    mentioned, cues = [], None
    for condition in FINDINGS:
        for match in _finding(condition).finditer(lower):
            start, end = match.span()
            value = {"denied": DENIED, "unsure": UNCERTAIN}.get(match.lastgroup)  # else None
            if match.lastgroup == "present":
                if cues is None:
                    cues = [(cue.lastgroup, *cue.span()) for cue in _cues().finditer(lower)]
                value = _by_cues(cues, start, end)
            known = condition == OTHER and any(m.start < end and start < m.end for m in mentioned)
            if not known:
                mentioned.append(Mention(start, end, condition, value))
    mentioned.sort(key=lambda m: m[:3])
    if any(kind == "still" for kind, *_ in cues or ()):  # "no change in A or B" has both
        return tuple(mentioned)
    return _unsure_between(mentioned, lower)


def _by_cues(cues, start, end):
    """1, 0, -1 or None (nothing said) by the cues before a finding, nearest first, and behind."""
    value = PRESENT
    for kind, first, last in reversed(cues):
        if first >= end or (kind == "end" and last > start):
            continue  # an end like ", and heart" may hold the finding itself
        if kind == "end":
            break
        if kind == "ignore":
            return None
        if kind == "no":
            return DENIED
        if kind in ("maybe", "unsure"):
            value = UNCERTAIN
    for kind, first, _ in cues:
        if first < end:
            continue
        if kind in ("end", "maybe"):
            break
        if kind == "gone":
            return DENIED
        if kind in ("unsure", "doubt"):
            value = UNCERTAIN
    return value


_OR = re.compile(r"[^,]*\b(?:versus|vs|and/or|or)\b[^,]*")


def _unsure_between(mentioned, lower):
    """The mentions, two of them uncertain where they stand as "A or B" or "A versus B"."""
    unsure = set()
    said = [m for m in mentioned if m.value in (PRESENT, UNCERTAIN)]
    for a, b in itertools.pairwise(said):
        between = lower[a.end:b.start]
        joined = _OR.fullmatch(between) and not matcher(CUES["maybe"]).search(between)
        if joined and a.condition != b.condition:
            unsure |= {a, b}
    return tuple(m._replace(value=UNCERTAIN) if m in unsure else m for m in mentioned)


# ---- the tables' notation, explained above them
_ITEM = re.compile(r"!?\([^)]*\)|\[[^]]*\]\+?|\S+")
_ANY_WORD = r"[\w'/-]+"


def _phrases(table):
    phrases = (" ".join(phrase.split()) for phrase in table.split(";"))
    return [phrase.replace("| ", "|") for phrase in phrases if phrase]


def _either(phrases):
    return f"(?:{'|'.join(_expression(phrase) for phrase in phrases)})"


def _expression(phrase, blank=""):
    """A phrase as a regular expression. blank: what stands before its first word."""
    pattern = ""
    for item in _ITEM.findall(phrase):
        if item.endswith("..."):
            blank = "[,:]?[ -]" if item[0] == "," else "[ -]"
            pattern += rf"(?:{blank}(?!{_list('stop')}(?!\w)){_ANY_WORD}){{0,9}}?"
        elif item == ".":
            pattern += r"(?=[^\w,]{0,9}$)"
        elif item[0] == "!" and not blank:
            pattern += "".join(rf"(?<!{word} )" for word in item[1:].split("|"))
        elif item[0] == "!":
            pattern += rf"(?!{_expression(item[1:].strip('()'), blank)}(?!\w))"
        elif item[0] == "(":
            pattern += rf"(?={_expression(item[1:-1], blank)}(?!\w))"
        elif item[0] == "[":
            words = item.strip("[]+")
            often = "{0,6}" if item.endswith("+") else "?"
            often += "?" if words == "_" else ""  # as few words as will do
            behind = "" if blank else "[ -]"
            pattern += f"(?:{_expression(words, blank)}{behind}){often}"
        else:
            pattern += ("" if item[0] in ",:" else blank) + _word(item)
            blank = "[ -]"
    return pattern


def _word(item):
    """one|two*|<list> as a regular expression."""
    expressions = []
    for word in item.split("|"):
        if word == "_":
            expressions.append(_ANY_WORD)
        elif word == "#":
            expressions.append(r"\d[\d/:.]*")
        elif word[0] == "<":
            expressions.append(_list(word.strip("<>")))
        else:
            escaped = re.escape(word).replace(r"\*", r"\w*")
            expressions.append(escaped.replace(r"\-", "[- ]?"))
    return f"(?:{'|'.join(expressions)})"


@functools.cache
def _list(name):
    return _either(_phrases(LISTS[name]))


@cached
def _is(name, word):
    """Whether a word is in the list of this name."""
    return bool(matcher(f"<{name}>").fullmatch(word))


@functools.cache
def matcher(table):
    """The phrases of a table as one compiled regular expression."""
    return re.compile(rf"\b{_either(_phrases(table))}(?!\w)", re.I)


@functools.cache
def _finding(condition):
    """A condition's phrases, as groups: unsure and denied ones before the plain ones."""
    groups = {"unsure": [], "denied": [], "present": []}
    signs = {"?": "unsure", "-": "denied"}
    for phrase in _phrases(FINDINGS[condition]):
        groups[signs.get(phrase[0], "present")].append(phrase.lstrip("?-"))
    return _grouped(groups)


@functools.cache
def _cues():
    return _grouped({kind: _phrases(table) for kind, table in CUES.items()})


def _grouped(groups):
    """Phrases as one expression for small letters, with a named group for each kind of them."""
    named = []
    for name, phrases in groups.items():
        if phrases:
            either = _either(phrase.lower() for phrase in phrases)
            named.append(rf"(?P<{name}>{either}(?:(?<=\?)|(?!\w)))")
    # Without re.I, which takes three times as long.
    return re.compile(rf"(?:\b|(?<!\w)(?=\?))(?:{'|'.join(named)})")


# ---------------------------------------------------------------- graphs (Sec. 4.3)

_TOKEN = re.compile(r"\d+\.\d+|[\w'/-]+|[^\w\s]")
_LABEL = {PRESENT: "OBS-DP", DENIED: "OBS-DA", UNCERTAIN: "OBS-U"}
XL_LABELS = {"ANAT-DP": "Anatomy::definitely present", "OBS-U": "Observation::uncertain",
             "OBS-DP": "Observation::definitely present",
             "OBS-DA": "Observation::definitely absent"}


@dataclass
class Node:
    """An entity of a sentence."""
    kind: str                # "place", "grade" or "finding"
    value: int               # PRESENT, DENIED or UNCERTAIN
    mention: Mention | None  # to which it belongs
    first: int               # its first token
    last: int
    relations: list          # (name, index of the target in the sentence)


def rule_graph(sentences, record=None):
    """A RadGraph record by rule: anatomy; present, absent, uncertain observations; relations.

    record: one that the sentences' entities are joined to, in its label style.
    """
    # DIFFERS from Sec. 4.3: graphs come from rules, unless --graphs or the record brings them.
    record = record or {"text": "", "entities": {}, "data_source": "rules"}
    text, entities = record["text"].split(), dict(record["entities"])
    xl = any("::" in e["label"] for e in entities.values())
    prefix = ""
    if entities:
        prefix = "joined "  # so that no key is there already
    for sentence in sentences:
        tokens, nodes = _sentence_graph(sentence)
        shift, base = len(text), len(entities) + 1
        for i, (words, label, first, last, relations) in enumerate(nodes, base):
            entities[f"{prefix}{i}"] = {
                "tokens": words, "label": XL_LABELS[label] if xl else label,
                "start_ix": shift + first, "end_ix": shift + last,
                "relations": [[name, f"{prefix}{base + to}"] for name, to in relations]}
        text += tokens
    return record | {"text": " ".join(text), "entities": entities}


@cached
def _sentence_graph(sentence):
    """The tokens of a sentence; (words, label, first token, last, relations) of its entities."""
    tokens, nodes = _nodes(sentence)
    findings = [i for i, node in enumerate(nodes) if node.kind == "finding"]
    sites = [i for i, node in enumerate(nodes) if node.kind == "place" and not node.relations]
    leads = [i for i, token in enumerate(tokens) if _is("suggests", token)]
    effects = [i for i in findings if leads and nodes[i].first > leads[0]]
    for i, node in enumerate(nodes):
        heads = findings or sites
        if node.kind == "grade" and heads:  # it stands before its head, if there is one behind it
            head = _nearest(i, [head for head in heads if head > i] or heads)
            node.relations.append(("modify", head))
            node.value = nodes[head].value  # "no mild edema"
        if node.kind == "finding" and sites:
            node.relations.append(("located_at", _nearest(i, sites)))
        if node.kind == "finding" and effects and node.last < leads[0]:
            node.relations.append(("suggestive_of", effects[0]))
    entities = []
    for node in nodes:
        words = " ".join(tokens[node.first:node.last + 1])
        label = "ANAT-DP" if node.kind == "place" else _LABEL[node.value]
        entities.append((words, label, node.first, node.last, node.relations))
    return tokens, entities


def _nearest(i, heads):
    """The head that is nearest to node i; of two the first."""
    return min(heads, key=lambda head: abs(head - i))


def _nodes(sentence):
    tokens, nodes, mentioned = [], [], mentions(sentence)
    for i, match in enumerate(_TOKEN.finditer(sentence)):
        tokens.append(match[0])
        around = [m for m in mentioned if m.start <= match.start() < m.end]
        mention = around[0] if around else None
        kind, value = _role(match[0], mention)
        if nodes and nodes[-1].last == i - 1:
            previous = nodes[-1]
            same = (previous.kind, previous.value, previous.mention) == ("finding", value, mention)
            if match[0] in ("cm", "mm") or (same and kind == "finding"):
                previous.last = i
                continue
            if previous.kind == kind == "place":  # in "left lower lobe" each modifies the next
                previous.relations.append(("modify", len(nodes)))
        if kind:
            nodes.append(Node(kind, value, mention, i, i, []))
    return tokens, nodes


def _role(word, mention):
    """Kind and value of the node that a word makes; kind None: it makes none."""
    for kind in ("place", "grade"):
        if _is(kind, word):
            return kind, PRESENT
    if _is("state", word):
        return "finding", PRESENT
    if mention and word[0].isalpha() and not _is("function", word):
        return "finding", mention.value
    return None, None


def negated_graph(graph, condition, denial):
    """r^n's record: r's without the condition's entities, joined to the graph of the denial."""
    entities, about = graph["entities"], _words_about(graph["text"], condition)
    kept = {key: e for key, e in entities.items() if e["start_ix"] not in about}
    for e in list(kept.values()):  # a place of another finding stays
        for _, target in e["relations"]:
            if entities[target]["label"].upper().startswith("ANAT"):
                kept[target] = entities[target]
    for key, e in kept.items():
        relations = [pair for pair in e["relations"] if pair[1] in kept]
        kept[key] = e | {"relations": relations}
    return rule_graph(denial, graph | {"entities": kept})


def _words_about(text, condition):
    """The places of the words of the condition's noun phrases, in a RadGraph record's text."""
    about, first = set(), 0
    for sentence in re.split(r"(?<= [.;]) ", text):
        for m in all_mentions(sentence):
            if m.condition == condition:  # "patchy" goes with its opacity, and "in the left lung"
                noun = _noun(sentence, m)
                begin = first + sentence.count(" ", 0, noun.start)
                about.update(range(begin, begin + sentence.count(" ", noun.start, noun.stop) + 1))
        first += sentence.count(" ") + 1
    return about


def bare_graph(where, graph):
    """A RadGraph record, also out of {"0": record}; UserError if it lacks what an edit needs.

    An entity is named by its place: its key and its words may be the patient's.
    """
    check_graph(where, graph)
    graph = graph.get("0", graph)
    expect(isinstance(graph.get("text"), str), where, "a RadGraph record with its text")
    for i, e in enumerate(graph.get("entities", {}).values(), 1):
        expect({"start_ix", "relations"} <= e.keys(), f"{where}: RadGraph entity {i}",
               "start_ix and relations")
    return graph


# ASSUMPTION: RadGraph's file describes the uncleaned report; its graph serves the cleaned one.
def read_graphs(path):
    """PhysioNet's MIMIC-CXR_graphs.json, whose keys end in s<study>.txt, as {study: record}."""
    records = read_json(path, dict)
    return {Path(name).stem.removeprefix("s"): graph for name, graph in records.items()}


# ---------------------------------------------------------------- CheXbert


class CheXbert:
    """The published CheXbert labeler: BERT-base, 13 heads of 4 classes and one of 2 (No Finding).

    checkpoint: its chexbert.pth, in which nothing may be missing or unknown; bert-base-uncased's
    vocab.txt lies beside it. sizes: BertConfig's names and numbers, where they are not the
    published ones. UserError if either file is not what it should be.
    Called with a batch of texts, it returns their labels.
    """

    def __init__(self, checkpoint, **sizes):
        import torch
        from transformers import BertConfig, BertModel, BertTokenizer
        self.config = BertConfig(**sizes)  # its defaults are BERT-base's
        width = self.config.hidden_size
        self.net = torch.nn.ModuleDict({
            "bert": BertModel(self.config),
            "linear_heads": torch.nn.ModuleList(torch.nn.Linear(width, n) for n in [4] * 13 + [2])})
        with open_file(checkpoint) as file:
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True)
                self.net.load_state_dict({
                    name.removeprefix("module."): tensor
                    for name, tensor in saved["model_state_dict"].items()
                    if not name.endswith(".position_ids")})
            except Exception as error:  # a file that is none can raise anything
                raise UserError(f"{checkpoint}: expected CheXbert's weights, plain tensors "
                                f"({type(error).__name__})") from None
        words = Path(checkpoint).resolve().parent / "vocab.txt"
        with open_file(words):
            self.tokenizer = BertTokenizer.from_pretrained(words.parent, do_lower_case=True)
        expect(len(self.tokenizer) == self.config.vocab_size, words,
               f"bert-base-uncased's {self.config.vocab_size} words")
        self.net.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, texts):
        import torch
        tokens = self.tokenizer(
            texts, padding=True, truncation=True,
            max_length=self.config.max_position_embeddings, return_tensors="pt")
        bert = self.net["bert"]
        with torch.inference_mode():
            cls = bert(**tokens.to(bert.device)).last_hidden_state[:, 0]  # (B, D)
            classes = [head(cls).argmax(1).tolist() for head in self.net["linear_heads"]]
        meaning = {1: PRESENT, 2: DENIED, 3: UNCERTAIN}  # 0: not mentioned
        return [{c: meaning[k] for c, k in zip(CONDITIONS, row, strict=True) if k}
                for row in zip(*classes, strict=True)]


# ---------------------------------------------------------------- files


def read_jobs(manifest, labeler, graphs):
    """Yields (record, labels) of a manifest, labels None unless they are given.

    graphs: of `read_graphs`, by study. UserError names file and line.
    """
    for number, record in read_jsonl(manifest):
        where, labels = f"{manifest}:{number}", None
        check_record(where, record, ("id", "report"))
        expect(not record["id"].startswith("cxr-align/"), where,
               "another set than CXR-Align, whose own r^r and r^n would be overwritten; "
               "evaluate.py takes the file as it is")
        if record.get("study_id") in graphs:
            record["graph"] = graphs[record["study_id"]]
        if record.get("graph"):
            record["graph"] = bare_graph(where, record["graph"])
        if labeler == "given":
            labels = record.get("labels") or None
        yield record, labels


def label_jobs(jobs, labeler):
    """The jobs with a model's labels of the cleaned texts, in batches."""
    while batch := list(itertools.islice(jobs, 32)):
        texts = [" ".join(clean(record)) for record, _ in batch]
        for (record, _), labels in zip(batch, labeler(texts), strict=True):
            yield record, labels


def annotate_job(job, seed):
    """A job as the line to write, in bytes, and what is to be counted of it."""
    record, labels = job
    record = annotate(record, seed=seed, labels=labels)
    line = json.dumps(record, ensure_ascii=False) + "\n"
    counts = Counter(f"positive: {condition}" for condition in positives(record["labels"]))
    skipped = counts.total() - len(record["hard_negatives"])
    counts["positives that the text does not state: no negative"] = skipped
    counts["studies"] = 1
    counts["studies with hard negatives"] = int(bool(record["hard_negatives"]))
    counts["studies of No Finding"] = record["labels"].get("No Finding", 0)
    counts["studies not understood"] = int(not understood(record["report"]))
    return line.encode("utf-8", "replace"), counts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("manifest", metavar="IN.jsonl", help="from data.py; needs id and report")
    add("--out", required=True, metavar="OUT.jsonl", help="the manifest to write")
    add("--labeler", choices=("rules", "chexbert", "given"), default="rules",
        help="given: the manifest's labels, as of MIMIC's tables; by rule where it has none")
    add("--chexbert", metavar="CKPT", help="chexbert.pth, for --labeler chexbert")
    add("--graphs", default="rules", metavar="rules|FILE.json",
        help="PhysioNet's MIMIC-CXR_graphs.json, or by rule where the record has none")
    add("--seed", type=minimum(0), default=0,
        help="draws order, phrasing and position of the denials")
    add("--workers", type=minimum(0), default=os.cpu_count(),
        help="processes, unless CheXbert labels")
    args = parser.parse_args(argv)
    if (args.labeler == "chexbert") != bool(args.chexbert):
        raise UserError("--labeler chexbert and --chexbert CKPT go together")
    return args


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm
    same = os.path.realpath(args.out) == os.path.realpath(args.manifest)
    expect(not same, f"--out {args.out}", "another file than the one that is read")
    counts = Counter()
    graphs, studies = {}, 0
    if args.graphs != "rules":
        graphs = read_graphs(args.graphs)
    for record, labels in read_jobs(args.manifest, args.labeler, graphs):
        studies += 1  # each line is checked here, so that no bad one stops the run after hours
        if args.labeler == "given" and labels is None:
            counts["labels: not given, made by rule"] += 1
        if graphs and record.get("study_id") not in graphs:
            counts["graphs: not in the file, made by rule"] += 1

    jobs = read_jobs(args.manifest, args.labeler, graphs)
    if args.chexbert:
        jobs, args.workers = label_jobs(jobs, CheXbert(args.chexbert)), 1
    with open_atomic(args.out, "wb") as file:
        work = functools.partial(annotate_job, seed=args.seed)
        lines = parallel(work, jobs, args.workers)
        for line, line_counts in tqdm(lines, unit=" studies", total=studies, disable=None):
            file.write(line)
            counts.update(line_counts)
    for name, number in sorted(counts.items()):
        print(f"{name:54s}{number:10,d}")
    if counts["studies not understood"] > 0.05 * studies:
        print("warning: more than 5 % were not understood; the rules read English")


# ---------------------------------------------------------------- tables, in words
#
# Phrases end at ";" and are looked for in one sentence, large and small letters alike:
#
#   word*       any ending; *word: any beginning
#   air-space   also "air space" and "airspace"; a blank between words also fits a hyphen
#   one|two     one of these words
#   _           any one word
#   #           a number, a date or a time
#   <heart>     a phrase of LISTS["heart"]
#   [words]     may be missing; [one|two]+ may also come several times
#   ...         up to nine words, none of them in <stop>; ,... the same, also past commas
#   !word       not followed by this word; at the beginning of a phrase: not behind it
#   (words)     must follow, but do not belong to the phrase; !(words): must not follow
#   .           the sentence ends here; , and : mean themselves
#
# "<heart> ... enlarged" fits "the cardiac silhouette is mildly enlarged". A new phrase goes into
# its row; try it by
#
#   python -c "from negations import label_report; print(label_report('Mild cardiomegaly.'))"
#
# A new condition needs its name in data.py's CONDITIONS, before Support Devices, which with No
# Finding stays last; a row in FINDINGS, above OTHER, and one in NOUNS; rows in data.py's PHRASES
# and DRAWINGS for the phantom; one in evaluate.py's PROMPT_NOUNS if its name is no good prompt.
# Tables of official labels, and CheXbert, know their 14 alone. To score it only, nothing is needed
# but "targets" in the manifest.

LISTS = {
    "heart": """
        cardio-thoracic ratio;
        heart|cardiac|cardio-mediastinal|cardio-pericardial !pace*|device*|lead*|valve*|monitor*
            [size|silhouette|silhouettes|shadow|contour|contours|outline];""",
    "mediastinum": """
        mediastinum|mediastinal|cardio-mediastinum|cardio-mediastinal
            !lymph|node*|mass*|adeno*|clip*|fat
            [silhouette|silhouettes|shadow|contour|contours|structures|width|size];""",
    "normal": """
        normal|unremarkable|wnl; not remarkable; within limits;
        upper limits [of] [the] [normal];
        not|isn't|aren't [_] enlarged|widened|prominent; no longer [_] enlarged|widened|prominent;
        cannot be [_] [_] enlarged|widened;""",
    "big": "enlarged|enlargement|prominent|prominence|increased|large|wide|widened|widening",
    "stop": """
        but; with !(_ limits); without; however; there; although; while; no; clear; which;
        abnormal; enlarged|widened|prominent|tortuous|borderline;""",
    # words of a text that was understood, and found normal
    "healthy": """
        normal|clear|unremarkable|stable|unchanged|negative|intact|healthy|midline|wnl|nad|nothing|
        maintained|preserved;
        within limits; no|without acute|active;
        no|without [_] [_] change|changes|interval|evidence;""",
    # for CUES
    "cannot": "cannot; can not; can't; could not; not; difficult to; hard to",
    "excluded": "exclude; excluded; rule out; ruled out",
    "solved": """
        ruled out; excluded|absent|resolved|cleared|gone|discontinued|disappeared|removed|explanted;
        taken out; withdrawn|pulled !to|back|by|into|and""",
    "doubt": """
        must|should be <excluded>; has|have|needs|need to be <excluded>;
        suspected|questioned|possible|considered|favored|favoured .;
        suspected|questioned|possible|considered (at|in|on);
        is|are|be [less|more|most] possible|suspected|questioned|considered;
        is|are|be|remains|remain [less|more|most] likely|probable|presumed .;
        is|are|be|remains|remain [less|more|most] likely|probable|presumed (,);
        is|are|be|remains|remain [less|more|most] likely|probable|presumed (in|at|on|given|based);
        is|are|be in the differential; is|are favored|favoured !to|over;
        is|are questionable|doubtful|equivocal; may|might|could have|look|appear;
        may|might|could be present|there|hidden|obscured;
        is|are|be|remains|remain a|an|the [_] possibility|consideration|concern|question""",
    "verdict": """
        <seen>|<solved>; both|all|not|no|been|unlikely|possible|suspected|questioned|considered|
        likely|probable|presumed|in|a""",
    "device": """
        ett|ngt|ogt|picc|tracheostomy|tube|tubes|catheter|catheters|line|lines|pacemaker|lead|leads|
        wires|drain|drains|port|icd|aicd|swan-ganz|device|devices|hardware|clips|cannula|sheath""",
    "seen": """
        seen|visible|visualized|visualised|present|noted|apparent|identified|appreciated|evident|
        detected|demonstrated|found""",
    # for TIME
    "prior": "prior|previous|preceding|last|comparison|old|outside|recent; earlier [in the day]",
    "study": """
        portable|exam*|study|studies|radiograph*|tomograph*|film|films|x-ray|x-rays|ct|xxxx|
        __*|chest|scan|
        scans|image|images|yesterday|today|morning""",
    "ago": "[performed] _ minute*|hour*|day*|week*|month*|year* ago|earlier",
    "the": "the|a|an|his|her|most|that|this|of|immediate|<prior>",
    "dated": "<study>|<ago>|from|dated|of|on|at|performed|pa|ap|lateral|am|pm|a.m|p.m|#",
    "then": """
        [<the>]+ <prior>|<ago>|19*|20* [<dated>]+; [<the>]+ [_] <study> [<dated>]+;
        [<the>]+ [_] <study> from|over|of [<the>]+ <prior> two|three|few days|weeks|months;
        [<the>]+ <prior> two|three|four|several|few days|weeks|months""",
    "earlier": "[<the>]+ <prior>|<ago>|yesterday|__* [<dated>]+; [<the>]+ _ [_] <prior> [<dated>]+",
    "since": "since|from|on|than; than on; as of",
    "steady": "unchanged|changed|stable [in appearance|size|position|configuration]",
    "how": """
        slightly|mildly|minimally|moderately|markedly|further|significantly|substantially|
        considerably|relatively|essentially|grossly|diffusely|somewhat|clearly|partially|now|
        appreciably""",
    "graded": "<how>|slight|mild|minimal|marked|significant|some",
    "compared": """
        compared|comparing|comparison|relative|differ*|change|changes; in comparison; <steady>;
        similar [in appearance];""",
    "more": """
        increase|increases|decrease|decreases|worsening|improvement|improvements|progression|
        reduction|reductions""",
    # words of a finding's noun phrase, and of graphs
    "place": """
        left|right|bilateral|bilaterally|both|left-sided|right-sided|internal|
        bibasilar|biapical|basilar|basal|apical|lower|upper|middle|mid|midlung|lingular|
        retrocardiac|perihilar|hilar|peripheral|central|medial|lateral|anterior|posterior|
        thoracic|lumbar|cervical|subclavian|jugular|cardiac|mediastinal|pleural|pulmonary|lung|
        lungs|lobe|lobes|base|bases|apex|apices|hilum|hila|heart|silhouette|silhouettes|
        mediastinum|aorta|aortic|trachea|diaphragm|hemidiaphragm|hemidiaphragms|rib|ribs|spine|
        clavicle|pleura|lingula|costophrenic|cardiophrenic|rul|rml|rll|lul|lll|svc|atrium|
        ventricle|stomach|humerus|shoulder|sternum|vertebra|vertebrae|vertebral|
        cardiomediastinal|contour|contours|vasculature|vascularity|angle|angles|sulcus|zone|
        zones|bones|osseous|structures|hemithorax|thorax|chest|abdomen|fissure|vessels|artery|
        arteries|vein|interstitium|bronchi|carina|cardiopulmonary|bony|skeletal|soft|tissues|
        airways|field|fields""",
    "grade": """
        mild-to-moderate|moderate-to-severe|small-to-moderate|moderate-to-large|
        mild|mildly|moderate|moderately|severe|severely|minimal|minimally|marked|markedly|trace|
        tiny|small|large|massive|subtle|slight|slightly|patchy|focal|diffuse|multifocal|
        scattered|streaky|linear|hazy|dense|ill-defined|acute|chronic|subsegmental|segmental|
        platelike|discoid|interstitial|alveolar|airspace|calcified|displaced|nondisplaced|
        healed|old|compression|multiple|few|several|early|extensive|faint|vague|loculated|
        layering|nodular|coarse|reticular|bullous|bandlike|confluent|active|significant|
        definite|mixed|round|rounded|cm|mm|#""",
    "state": """
        normal|clear|unremarkable|intact|midline|expanded|inflated|aerated""",
    "located": "in|of|at|within|involving|overlying [the] [_] [_] [_] <place> [<place>]+",
    # no nodes of a graph, even within a finding
    "suggests": "suggest*|represent*|consistent|compatible|reflect*|concern*|due",
    "function": """
        the|a|an|is|are|was|were|of|in|at|to|with|and|or|not|within|no|size|top|upper|high|
        limit|limits|range""",
    # words that say nothing: a sentence of these alone goes, one that lost a comparison sooner
    "leftover": "<empty>|<place>",
    "empty": """
        #|*-xxxx|__*|the|a|an|is|are|was|of|in|there|chest|exam|examination|study|studies|
        appearance|finding|findings|xxxx|this|these|it|and|or|with|to|no|not|has|have|been|from|by|
        comparison|compared|prior|previous|available|none|interval|change|changes|changed|otherwise|
        overall|radiograph|radiographs|film|films|x-ray|as|on|at|for|made|significant|
        significantly|view|views|also|appear|appears|size|shape|configuration|volumes|dated|
        comparisons|images|currently""",
}
# A phrase states the finding, unless CUES beside it deny or hedge it. -phrase: denies it by
# itself; ?phrase: hedges it by itself.
FINDINGS = {
    "Enlarged Cardiomediastinum": """
        <mediastinum> ... <big>; <big> [of] !and [_] !and [_] <mediastinum>;
        -<mediastinum> ,... <normal>;
        -normal|unremarkable ,... <mediastinum> !(is|appears|remains [_] [_] <big>);
        ?<mediastinum> ,... borderline;""",
    "Cardiomegaly": """
        cardiomegaly; cardiac|ventricular enlargement;
        <heart> ... enlarged|enlargement|prominent|prominence|widen*|larger|bigger|grown;
        <heart> : [_] enlarged; <heart> , which is [_] enlarged; dilated|bulky <heart>;
        increase|increased in [the] [_] [size|diameter|width] [of] [the] <heart>;
        <heart> [xxxx|is|are|appears|remains|has|been]+ [_] large|increased|wide|big;
        <big> [size] [of] !and [_] !and [_] <heart>;
        -<heart> ,... <normal>; -<normal> ,... <heart> !(is|appears|remains [_] [_] <big>);
        ?<heart> ,... borderline; ?borderline [_] [_] [_] heart|cardi*;""",
    "Lung Opacity": """
        [_] opacity|opacities|opacif*; infiltrat*; haze|haziness|hazy; ground-glass;
        white-out; shadowing;
        air-space disease|process; air-space _ disease;
        lung|pulmonary|airspace|increased|patchy|hazy|vague|streaky|ill-defined densit*;
        -lung|lungs|hemithora* ,... clear !of; -clear [_] lung|lungs;""",
    "Lung Lesion": """
        nodul*|micronodul* !infiltr*|contour*|interst*|pattern [opacit*|densit*|lesion*];
        calcif* [<place>]+ nodul*|mass|masses; mass|masses !effect; neoplas*; malignan*;
        tumor|tumors|tumour|tumours; *carcinoma|*carcinomas|cancer|cancers;
        metasta* [disease|process];
        lung|pulmonary|cavit*|focal|round|rounded lesion|lesions;""",
    "Edema": "!tissue edema|oedema;",
    "Consolidation": "consolidat*;",
    "Pneumonia": """
        pneumonia|pneumonias|pneumoniae|pneumonitis|bronchopneumonia|bronchopneumonias|pna;
        !granulomatous|tuberculous|prior|old|remote infecti* [process|etiology];""",
    "Atelectasis": """
        atelecta*; !vertebral|vertebra|body|compression collapse; collaps* ... lobe|lung;""",
    "Pneumothorax": "*pneumo-thora*|ptx;",
    "Pleural Effusion": """
        !pericardial|joint effusion|effusions; pleural [_] fluid; loculated|layering fluid;
        fluid in|at|within the [_] [_] fissure|fissures|sulcus|base|bases|hemithorax;
        hydro-pneumo*|hemo-pneumo*|haemo-pneumo*|hemothora*|haemothora*;
        -pleural space|spaces [_] clear|free|devoid; -pleural space|spaces without fluid;""",
    "Pleural Other": """
        pleural [_] thicken*|scar*|plaque|plaques|calcif*|capping|cap; thicken* of the [_] pleura;
        apical|biapical cap*; pleuro-parenchymal _; fibrothorax;""",
    "Fracture": "!lead|wire fractur* !fixation;",
    "Support Devices": """
        -extubated|extubation; [_] tube|tubes|port|drain|drains|clip|clips|device|devices;
        intubated; tracheostomy; *catheter|*catheters [sheath|sheaths];
        pace-maker|pace-makers; port-a-cath*; mediport;
        central|venous|picc|ij|jugular|subclavian|arterial [_] line|lines; picc|piccs;
        prosthe*; [fracture] [fixation] hardware; fixation|metal*|surgical plate|plates;
        pigtail|pigtails; rod|rods|tubing|sheath|sheaths|staple|staples;
        screw|screws;
        stent|stents; icd|aicd;
        pacer|pacing|icd|aicd|ventricular|monitor*|ekg|ecg [_] lead|leads|wire|wires;
        defibrillator|defibrillators|stimulator|stimulators|generator|generators;
        [intact] [sternal|sternotomy|cerclage] wires|sutures; sternal|sternotomy wire|suture;
        balloon pump; ett|etts|ngt|ogt|iabp|lvad|rvad|cvc|cvl|uac|uvc|tavr;
        swan-ganz [catheter|catheters]; dobhoff|dobbhoff;
        *cannula|*cannulas; prosthetic|mechanical|artificial|bioprosthetic [_] valve|valves;
        valve replacement|prosthesis;""",
    OTHER: """
        *granulom*; scar|scars|scarred|scarring; *emphysem*; copd; obstructive; fibrosis|fibrotic;
        hyper-inflat*|hyper-expan*|hyper-aerat*|hyper-lucen*; hypo-inflat*|hypo-aerat*|hypo-ventil*;
        *scolio*; *kypho*; curvature; post-traumatic; spond*; degenerat*; osteophyt*; arthr*; spur*;
        deminerali*; osteopen*|osteopor*; hernia*; tort*; ectat*; ectasia; unfold*; uncoil*;
        calcif*; *sclerosis|*sclerotic; aneurysm*; eventrat*; elevat*; volume loss; *adenopath*;
        congesti*; bronchiectas*; thicken*; engorge*; !less|more prominen*; enlarge*; deformit*;
        dislocat*; cyst|cysts|cystic; bulla|bullae|bullous; bleb|blebs; cavity|cavitary|cavitation;
        sarcoid*; tubercul*; hyperosto*; bullet*; fluid|volume overload; cephaliz*|cephalis*;
        redistribut*;
        low|lower|small|decreased|diminished|reduced [lung] volume|volumes|inspir*; foreign bod*;
        volume|volumes [are|is|have|has|been|remain|remains]+ [_] low|lower|decreased|reduced;
        worse|worsening|worsened|decreased|poor aeration; aspiration|contusion|contusions;
        ards; emboli; interstitial|reticular [lung] [_] change*|disease|thickening;
        subcutaneous|soft-tissue air|gas; increased|prominent|engorged [_] vascular*|vasculature;
        coronary [artery] bypass [graft*]; distension|distention|distended; dextrocardia;
        situs inversus; right [sided] aortic arch;
        increased|coarse*|crowd* [_] [_] markings; crowding; kerley; *bronchial cuffing;
        blunt*; flatten*; pectus; lucen*; heart failure; chf; hypertension;
        pneumo-periton*|pneumo-mediastin*; free [_] air; shift*; deviat*; fullness; sternotomy;
        *ectomy; cabg; surg*|operat*|post-surg*|post-operat* change*; bypass; effusion|effusions;
        density|densities; lesion|lesions; injur*; distort*; retract*; chronic _ change*|disease*;
        abnormalit*; !coracoid|xiphoid|glenoid|spinous|transverse|styloid process|disease;
        acute|abnormal|significant|active|*pulmonary|bony|osseous finding|findings;""",
}
# What stands beside a finding. Of two that begin at the same word the upper one counts.
#   unsure  hedges what stands before and behind it      no      denies what follows
#   maybe   hedges what follows                          gone    denies what stands before
#   ignore  of what follows nothing is said              end     the others reach no further
#   skip    looks like one of them and is none; still: the same, and "A or B" behind it has both
CUES = {
    "unsure": """
        <cannot> [_] [be] [entirely|completely|definitely] <excluded>; versus|vs; ?;
        absence of ... cannot; is|are favored|favoured over;
        if any|present .; if any|present (,);
        not well|clearly <seen> !(on [the] [_] prior|previous|lateral|frontal);""",
    "doubt": "<doubt>",
    "still": """
        no|not|without|little [_] [_] change|changed|increase|increased|decrease|decreased [in|of];
        no|not|without|little [_] [_] difference|worsen*|improve*|progress* [in|of];
        no|not|without|little [_] [_] growth|expansion|progression|re-accumulation of|in;
        no|without interval|further|significant|new [_] enlargement of|in;
        no|without [_] enlargement of ... nodule|nodules|mass|masses|effusion|pneumothorax|opacity;
        no|without displacement of|in; lack of [_] change|improvement|progression in|of;
        no|not|without|little [_] [_] changes in|from|since;
        no|not|without [_] resolution|clearing of;""",
    "skip": """
        no comparison|prior|priors|previous; not only|just|merely|include*|true|without;
        not [_] [_] <solved>;
        obscur* [_] by; no doubt;
        non displaced|calcified|specific|acute; not [_] <seen> previously|before;
        tip|tips|end|course ... not [_] <seen>; not previously <seen>;
        some|partial|substantial|mild|moderate|significant|marked [interval] clearing of;
        follow-up [_] [_] show*|demonstrat*|reveal*;
        not [well|fully|completely] evaluated|assessed;
        compatible|consistent|associated|correlat*|along|together with; in keeping with;
        not|better [_] <seen> [_] on [the] [_] prior|previous|lateral|frontal|ct;
        near|nearly|almost|most|mostly|large|largely|partial|partially|incomplete|incompletely
            [_] resol*|clear* [of];""",
    "gone": """
        is|are|was|were|has|have|had
            [now|since|been|completely|entirely|essentially|subsequently]+ <solved>;
        which is|are no longer <seen>; which has|have [been] <solved>; is|are lacking;
        nowhere to be <seen>; is|are both|all absent; can be <solved>; resolved|removed|absent .;
        resolved (,); removed; ruled out; taken out; removal !of; unlikely; none .;
        : none|no|absent|negative .; consistent with|represent*|likely nipple|artifact*|overlapping;
        not|cannot|isn't|aren't|wasn't|weren't [_] <seen> !is|are; no longer [_] <seen> !is|are;""",
    "ignore": """
        indication :; reason for _ :; clinical question|worry|concern;
        if there is|are [_] concern|suspicion; recommend*; advise*; correlat*;
        evaluat*|assess* for|of|to; sensitiv*; obscur*; history of;
        h/o; to determine|clarify; please note; to identify; look for; f/u; follow-up;
        ensure|document|confirm|until [_] [_] resol*|clear* [of];""",
    "no": """
        negative|free|clear|devoid for|of|from; no longer; rather than; instead of; no; not;
        without; w/o; never; fails|fail|failed to _; unlikely|nothing to _; neither; nor; denies;
        absent; non; complete drainage|evacuation of;
        isn't|aren't|wasn't|weren't|doesn't|don't;
        resolved; removal of ... <device> and;
        [interval|complete] removal|resolution|clearing|absence|lack of;""",
    "maybe": """
        possible|possibly|probable|probably|likely|perhaps [_] secondary|due|related to;
        may|might|could [also|well]+ [be] [secondary|due|related to]; possible|possibly;
        probable|probably; likely; suspect*; suspicious for|of; concern*; question*; suggest*;
        consider|considered|considering;
        perhaps; possibility; suspicion; favor|favors|favours; favored|favoured|felt|thought to;
        potential*; worrisome; query;
        presum*; doubt*; rule out; exclude; equivocal; indeterminate for;
        differential; apparent; borderline; if;""",
    "end": """
        , !(... or|and|nor) (_ ... <doubt>|<solved>|cannot|not|versus|vs|hard|difficult);
        <seen>|enlarged and (... <doubt>|cannot); and ([_] [_] <device> #|with|in|at|tip|ends);
        , !(,... or|nor|and) ([_] [_] <device>);
        ,|and !(,... or|nor) (worse|worsening|interval|layering|healing|progressive|known);
        ,|and !(,... or|nor) (... is|are|has|have|persist|persists !<verdict>);
        but; however; although; though; except; aside from; other than; otherwise; which;
        positive for; apart from; secondary to; status post; s/p; because; while; whereas; yet;
        :; with;
        after|following ([_] [_] [_] place*|remov*|insert*|intubat*);
        ,|and (the|there|stable|is|are|may|with|unchanged|status|again|which|however|limited);
        ,|and (possible|possibly|probable|probably|likely|consistent|compatible|visuali*|mediast*);
        ,|and (heart|cardiac|cardio-mediastinal|cardio-pericardial !enlarg*);
        ,|and (lung|lungs !lesion*|nodul*|mass|masses|opac*|consol*|infiltr*);
        ,|and (cardiomegaly is|was|remains|persists|has);
        ,|and !(,... or|nor) (a|an|mild*|moderate*|minimal*|marked*|severe*|small|large|low|old);
        ,|and !(,... or|nor) (tortuous|degenerative|normal|prominent|calcified|chronic|healed);
        ,|and !(,... or|nor) (bilateral|left|right|multiple|hyper*);
        ,|and !(,... or|nor) (new|persistent|residual|increased|decreased|improv*|trace|tiny);
        ,|and !(,... or|nor) (patchy|bibasilar|linear|subsegmental|streaky|placement|insertion);""",
}
# What refers to earlier examinations, and what takes its place (mostly nothing).
TIME = {
    "remains": "is",
    "remain": "are",
    "there has|have been": "there is",
    "normal and stable|unchanged": "normal",
    """
        [when|as] <compared> [<how>] to|with|from|since <then>;
        no better|worse|larger|smaller than <earlier>;
        <since> <earlier> !fractur*|surg*|trauma|injur*|infect*|operat*;
        [not|as|better] [<how>|well] seen|noted|appreciated|*er|worse <since> <earlier>;
        [<how>] more|less _ <since> <earlier>; since 19*|20*; as before;
        similar to before; in|over|during the interval; in the interim; redemonstrated;
        redemonstration of; similar|stable|unchanged [in] appearance of [the] [chest with];
        no|without|little [_] [_] change|changes [in|of] [the] [size|appearance|extent] [of] [the];
        no|without|little [_] [_] <more> in|of [the] [size|appearance|extent] [of] [the];
        no|without|little [_] [_] <more> .;
        [<graded>] interval development|appearance|change|changes|placement|enlargement|<more>
            [of|in] [the];
        with [mild|minimal|small] residual .; stable|unchanged and (normal|within|unremarkable);
        !there has|have increased|decreased in size and number|extent;
        following|after [_] [_] thoracentesis|drainage|diuresis|extubation ,;
        persist|persists; [not|no] [<how>|overall] <steady>; new !york;
        [<graded>] <more> in|of [the] [size of] [the];
        [<how>] less|more prominent|conspicuous|apparent|evident|pronounced|extensive
            !than|on|in|at;
        [<how>] larger|smaller|worse !than|on|in|at|one|left|right;
        [<how>] worsened|worsening|interval|improved|improving|resolving|enlarging|increasing;
        [<how>] decreasing|persistent|persistently|continued|recurrent|residual;
        !there has|have|is|are [<how>] increased|decreased|progressed|developed|improved|worsened
            [in size|number|extent];
        !there has|have|is|are [<how>] recurred|enlarged .;
        is|are [<how>] better|similar|evolving .;
        [<how>] increased|decreased|progressing|progressive (<place>|<grade>|effusion*|pneumo*|
            opaci*|edema|atelecta*|consolidat*|infiltrat*);
        [<how>] increased|decreased [in size] .; [<how>] increased|decreased [in size] (,);
        [<how>] increased|decreased [in size] (since|from|compared);
        in unchanged|stable|similar position|location|appearance;
        [once] again|previously|newly|now [seen|noted|demonstrated|identified|described|is|are]+;
    """: " ",
}
NOUNS = {  # how a condition is denied: nouns for DENIALS that leave none of it out, or sentences;
    # all of words that reports use, or a denial would be told from theirs by its words alone
    "Enlarged Cardiomediastinum": """
        mediastinal widening; mediastinal enlargement; The mediastinum is normal in width.""",
    "Cardiomegaly": """
        cardiac enlargement; The heart is not enlarged.; The heart is normal in size.;
        Heart size is within normal limits.""",
    "Lung Opacity": "pulmonary opacity; airspace opacity; lung infiltrate",
    "Lung Lesion": "nodule or mass; mass or nodule; lung nodule or mass",
    "Edema": "pulmonary edema; lung edema; edema in the lungs; edema",
    "Consolidation": "consolidation; focal consolidation; focal airspace consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion; pleural fluid",
    "Pleural Other": "pleural thickening",
    "Fracture": "fracture; bony fracture; osseous fracture",
    "Support Devices": "catheter, tube or device; line, tube or device",
}
# ASSUMPTION: the predefined negative statements (Sec. 3) are unpublished; these are ours.
DENIALS = "No {}.; There is no {}.; No evidence of {}.; No {} is seen.; Negative for {}."


if __name__ == "__main__":
    run_main(main)
