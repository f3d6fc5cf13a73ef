"""The instructions whose MiniLM vectors ship in instructions.safetensors.

All of the tasks in spec.py, with every pair of SIMPLER's "move near"; and RT-1's published task
families over its objects and receptacles. The latter are built from the families and from lists
of instructions that users of the data set published; they were NOT read from the data set, whose
599 distinct texts are not at hand. So a few of those may be missing, and many here may never occur
in it. `unknown` in text.py tells before a training which ones an encoder cannot read.
"""

from itertools import permutations

from selfflow.datasets.spec import TASKS

CANS = ("7up can", "coke can", "green can", "orange can", "pepsi can", "redbull can")
BOTTLES = ("blue plastic bottle", "water bottle")
CHIPS = ("blue chip bag", "brown chip bag", "green jalapeno chip bag", "green rice chip bag")
BARS = ("rxbar blueberry", "rxbar chocolate")
OBJECTS = (*CANS, *BOTTLES, *CHIPS, *BARS, "apple", "banana", "orange", "sponge")
BOWLS = ("paper bowl", "white bowl")
DRAWERS = ("top drawer", "middle drawer", "bottom drawer")
SHELVES = ("top shelf of fridge", "middle shelf of fridge", "bottom shelf of fridge")
DOORS = ("left fridge door", "right fridge door")
# of Octo's Bridge sample, on which examples and tests run
BRIDGE_SAMPLE = (
    "put cup from counter or drying rack into sink",
    "flip pot upright which is in sink",
    "turn lever vertical to front",
    "put carrot on plate",
)


def instructions() -> list[str]:
    """All of them, sorted, each once."""
    tasks = [text for task in TASKS.values() for text in task.instructions if "{" not in text]
    return sorted({*tasks, *rt1_families(), *BRIDGE_SAMPLE})


def rt1_families() -> list[str]:
    """RT-1's task families: pick, move near, upright, knock over, open, close, place into, pick
    from."""
    movable = (*OBJECTS, *BOWLS)
    inside = [(thing, place) for thing in OBJECTS for place in (*DRAWERS, *BOWLS)]
    return [
        *(f"pick {thing}" for thing in movable),
        *(f"move {thing} near {other}" for thing, other in permutations(movable, 2)),
        *(f"place {thing} upright" for thing in (*CANS, *BOTTLES)),
        *(f"knock {thing} over" for thing in (*CANS, *BOTTLES)),
        *(f"{verb} {front}" for verb in ("open", "close") for front in (*DRAWERS, *DOORS)),
        *(f"place {thing} into {place}" for thing, place in inside),
        *(f"pick {thing} from {place} and place on counter" for thing, place in inside),
        *(f"pick {thing} from {bowl}" for thing in OBJECTS for bowl in BOWLS),
        *(f"pick {thing} from {shelf}" for thing in (*CANS, *BOTTLES) for shelf in SHELVES),
    ]
