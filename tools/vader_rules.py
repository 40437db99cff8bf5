"""Write VADER's sentiment lexicon as a file of rules.

    python tools/vader_rules.py vader_lexicon.txt [--emoji emoji_utf8_lexicon.txt] [-o vader.json]

Both files are in the package vaderSentiment (MIT licence). An emoji's score is the sum of its description's words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgemix.recipe.rules_file import RuleSet

BOOST = 0.293
MORE = """
absolutely amazingly awfully completely considerable considerably decidedly deeply effing enormous enormously entirely
especially exceptional exceptionally extreme extremely fabulously fully greatly hella highly hugely incredible
intensely major majorly more most particularly purely quite really remarkably so substantially thoroughly total totally
incredibly tremendous tremendously uber unbelievably unusually utter utterly very"""
LESS = """
almost barely hardly kinda kindof less little marginal marginally occasional occasionally partly scarce scarcely slight
slightly somewhat sorta sortof"""
NOT = """
aint arent cant couldnt darent didnt doesnt dont hadnt hasnt havent isnt mightnt mustnt neednt oughtnt shant shouldnt
wasnt werent wont wouldnt"""
NEVER = "cannot neither never none nope nor not nothing nowhere without rarely seldom despite"
PHRASES = {"the shit": 3, "the bomb": 3, "bad ass": 1.5, "badass": 1.5, "bus stop": 0, "yeah right": -2}
PHRASES |= {"kiss of death": -1.5, "to die for": 3, "beating heart": 3.5}


def rules_of(lexicon: str, emoji: str = "") -> RuleSet:
    """Return rules for the labels negative and positive from the text of VADER's files."""
    rows = (line.split("\t") for line in lexicon.splitlines() if line.strip())
    words = {row[0].strip().lower(): float(row[1]) for row in rows}
    scores = words | PHRASES
    for row in (line.split("\t") for line in emoji.splitlines() if line.strip()):
        if score := sum(words.get(word, 0.0) for word in row[1].lower().split()):
            scores[row[0]] = score
    less = [*LESS.split(), "just enough", "kind of", "sort of"]
    return RuleSet(
        labels=("negative", "positive"),
        axis=("negative", "positive"),
        scores={text: score for text, score in scores.items() if text},
        negations=(*NEVER.split(), *NOT.split(), *(f"{word[:-1]}'t" for word in NOT.split())),
        boosters=dict.fromkeys(MORE.split(), BOOST) | dict.fromkeys(less, -BOOST),
        capitals=0.733,
        exclamation=0.292,
    )


def main() -> None:
    """Read the files, and write the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lexicon", type=Path)
    parser.add_argument("--emoji", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("vader.json"))
    options = parser.parse_args()
    emoji = options.emoji.read_text("utf-8") if options.emoji else ""
    rules = RuleSet.parse(rules_of(options.lexicon.read_text("utf-8"), emoji).save())
    options.output.write_bytes(rules.save())
    print(f"{options.output}: {len(rules.scores):,} entries")


if __name__ == "__main__":
    main()
