"""The reward of the quickstart's task: the house's answer, letter for letter. What is right is known; no answer is ever shown."""


def correct(completion: str, answer: str) -> float:
    """1 if it is the answer and nothing else."""
    return float(completion.strip() == answer)


def value(completion: str, answer: str) -> float:
    """1 if the value is right, whatever is said of it."""
    return float(completion.strip().partition(" (")[0] == answer.partition(" (")[0])
