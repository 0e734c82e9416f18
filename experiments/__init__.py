"""One question a file, each with its prediction, its result and its figure: docs/experiments.md.

    make experiments                     # all that have no result yet; or one of them:
    python -m experiments.frontier       # writes out/experiments/frontier.json and .png

A file holds all that its question needs. What several of them need is in experiments/shared. Three
more files ask about labels: simulated_person, labels_or_comparisons and learning_curve
(docs/people.md). They are not part of `make experiments`.
"""
ALL = ("choices", "frontier", "goodhart", "methods", "where_the_kl_goes", "over_optimisation",
       "recursive_reward_modelling", "weak_to_strong", "amplification", "debate",
       "gradient_protection", "elk")
