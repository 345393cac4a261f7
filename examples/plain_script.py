"""Everything a plain script may send to a pool, without a main guard.

Lambdas, closures, functions and classes defined right here, generators: they work in a script, in
the interactive interpreter and in a notebook. Workers never import or run this file, so its first
line of output is printed once.

    python plain_script.py
"""

import math
import os

from whitepool_mp import Pool

print(f"the body of {__name__} runs once, in pid {os.getpid()}")

SCALE = 10


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __repr__(self):
        return f"Point({self.x}, {self.y})"

    def moved(self, dx, dy):
        return Point(self.x + dx, self.y + dy)


def scaled(x):
    """A function of __main__ that uses a global and an imported module."""
    return math.isqrt(x) * SCALE


def power_of(exponent):
    """Gives a closure."""
    return lambda x: x**exponent


def numbers():
    """Feeds `map` bit by bit, in this process."""
    for n in range(1, 8):
        yield n * 100


with Pool(pool_size=2, name="plain") as session:
    print("a lambda:", session.run(lambda a, b: a + b, 40, 2))
    print("a function of this script:", session.run(scaled, 144))
    print("a closure:", session.run(power_of(3), 7))
    print("a built-in:", session.run(math.factorial, 20))

    # An instance of a class of this script goes there and comes back.
    home = session.run(lambda point: point.moved(1, 1), Point(1, 2))
    print("an instance there and back:", home, "- isinstance:", isinstance(home, Point))
    print("a method:", session.run(home.moved, 10, 20))

    print("map over a generator:", list(session.map(power_of(2), numbers())))
    print("as they finish:", sorted(session.map(scaled, (n * n for n in numbers()), ordered=False)))

    future = session.submit(lambda: os.getpid())
    print("in another process:", future.result(timeout=30) != os.getpid())

    # An exception arrives as its own type, also one that is defined here.
    class TooHot(Exception):
        def __init__(self, degrees, place):
            super().__init__(degrees, place)
            self.degrees, self.place = degrees, place

        def __str__(self):
            return f"{self.degrees} degrees in {self.place}"

    def measure(place):
        raise TooHot(45, place)

    try:
        session.run(measure, "the attic")
    except TooHot as error:
        print(f"an exception: {type(error).__name__}: {error} ({error.degrees}, {error.place!r})")
