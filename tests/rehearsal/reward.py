"""Score responses of an untrained model, so that most groups have pairs."""


def compute_score(solution_str, **_):
    return sum(map(ord, solution_str)) % 7 / 6
