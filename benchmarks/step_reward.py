"""Score a response by its number of distinct characters, so that rewards differ: for timing."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / 100
