"""A harness: the same game of guessing a number, played by a client of OpenAI's API that asks the model under training itself.

A row of the data holds the number: {"number": 42, "most": 100}
"""

import re

GUESSES = 7


async def rollout(client, row):
    """One game: what it was worth, and what is drawn beside it."""
    turns = [{"role": "user", "content": f"I think of a number from 1 to {row.get('most', 100)}. Guess it."}]
    for guesses in range(1, GUESSES + 1):
        reply = await client.chat.completions.create(model="policy", messages=turns, max_tokens=32)
        said = reply.choices[0].message.content
        found = re.findall(r"\d+", said)
        if found and int(found[-1]) == row["number"]:
            return {"reward": 1.0, "guesses": guesses}
        answer = "That is no number." if not found else "higher" if int(found[-1]) < row["number"] else "lower"
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": answer}]
    return {"reward": 0.0, "guesses": GUESSES}
