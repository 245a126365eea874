"""The closed vocabularies. Words are shared by the training and the held-out split; their combinations are not."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Adam Alice Anna Ben Clara David Emma Erik Felix Greta Hugo Ida Igor Jack Julia Karl "
    "Kim Leo Lucy Marta Max Nora Oscar Paul Rosa Ruth Sam Tom Ula Vera Will Zoe"
)
CITIES = _words(
    "Accra Basel Bath Bonn Cairo Cork Davos Delhi Dubai Essen Fez Ghent Graz Hanoi Izmir Kyiv "
    "Lagos Lima Lyon Malmo Milan Minsk Nice Osaka Oslo Paris Perth Porto Quito Rome Sofia Tokyo"
)
ITEMS = _words(
    "apple bread brush candy chair clock cup desk drum flute fork glove jam juice kite knife "
    "lamp melon milk oven paper pen phone rice rope salt shoe soap sugar table towel watch"
)
PETS = _words(
    "bat bear bee camel cat cow crab crow deer dog duck eagle fish fox frog goat "
    "hare horse lion mole mouse owl panda pig rat seal sheep snail swan tiger wolf zebra"
)
JOBS = _words(
    "actor baker boxer chef clerk coach cook diver drama fire gamer guard guide host judge law "
    "maid mayor miner model nanny navy nurse pilot poet rider sales smith spy tutor vet waiter"
)

# Field of a document -> its values; None stands for a number from 10 to 99.
FIELDS: dict[str, list[str] | None] = {
    "name": NAMES,
    "city": CITIES,
    "item": ITEMS,
    "pet": PETS,
    "job": JOBS,
    "sum": None,
    "room": None,
}
NUMBERS = tuple(str(n) for n in range(10, 100))
TENS = NUMBERS[::10]

# Colour name -> RGB. Far enough apart that JPEG and resizing cannot swap two of them.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 30),
    "purple": (130, 40, 160),
    "orange": (250, 140, 20),
    "black": (20, 20, 20),
    "pink": (250, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring")


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")
