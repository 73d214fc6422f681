"""A reward that differs between any answers: for timing."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / 100
