"""Measure how far people agree with each other, and with the machine."""
import itertools

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from people.answers import stage


def cohen_kappa(a: list[str], b: list[str]) -> float:
    """Compute how far two labellers agree on the same items beyond chance (Cohen 1960). The result
    is 1 if they agree on all items, even if all labels are the same."""
    return 1.0 if a == b else float(cohen_kappa_score(a, b))


def kappas(people: dict[str, dict[str, str]]) -> dict[str, tuple[float, int]]:
    """Compute Cohen's kappa for each pair of people -> "NAME and NAME" -> kappa, and the number of
    items that both labelled. people: name -> id -> label."""
    found = {}
    for a, b in itertools.combinations(sorted(people), 2):
        common = [i for i in people[a] if i in people[b]]
        if common:
            kappa = cohen_kappa([people[a][i] for i in common], [people[b][i] for i in common])
            found[f"{a} and {b}"] = kappa, len(common)
    return found


def agreement(people: dict[str, dict[str, str]]) -> dict:
    """Compute how far all people agree -> "alpha" (Krippendorff 2004, nominal), and "disputed", the
    ids on which answers differ. people: name -> id -> label."""
    ids = sorted({i for labels in people.values() for i in labels})
    codes = {label: code for code, label in enumerate(
        sorted({label for labels in people.values() for label in labels.values()}))}
    coded = np.array([[codes[labels[i]] if i in labels else np.nan for i in ids]
                      for labels in people.values()])                          # (people, items)
    given = [column[~np.isnan(column)] for column in coded.T]
    shared = [column for column in given if len(column) > 1]
    varied = len(shared) > 0 and len(np.unique(np.concatenate(shared))) > 1
    alpha = krippendorff.alpha(coded, level_of_measurement="nominal") if varied else float("nan")
    disputed = [i for i, column in zip(ids, given) if len(np.unique(column)) > 1]
    return {"alpha": alpha, "disputed": disputed}


def print_agreement(people: dict[str, dict[str, str]], items: list[dict]) -> None:
    """Print kappa for each pair, including pairs with the machine. Then print alpha for all people,
    and up to ten items on which they differ. A skip is not an answer."""
    people = {name: {i: label for i, label in labels.items() if label != "skip"}
              for name, labels in people.items()}
    for pair, (kappa, n) in kappas(people).items():
        print(f"{pair}: Cohen's kappa {kappa:.2f} on {n} common items")
    people = {name: labels for name, labels in people.items() if name != "vader"}
    if len(people) < 2:
        return
    found = agreement(people)
    by_id = {item["id"]: item for item in items}
    disputed = [key for key in found["disputed"] if key in by_id]
    print(f"Krippendorff's alpha over all people: {found['alpha']:.2f}; answers differ on "
          f"{len(found['disputed'])} items")
    for key in disputed[:10]:
        given = (f"{name} {labels[key]}" for name, labels in people.items() if key in labels)
        print("---", ", ".join(given))
        print(stage.as_text(by_id[key]))
