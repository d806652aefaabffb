"""Who buys what in the demo shop: the true probability of every next purchase, and histories drawn from it.

A purchase follows the last one (a sleeping bag after the tent, preferably of the same line), or the one before it
(people have two projects going), or the customer's lasting taste in departments. Within a product type the choice goes
by the type's best sellers, the customer's favourite brand and the price level that the customer is used to. Nobody buys
the same item twice or one that is not on sale yet, and a second item of a type is less likely.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.sources.demo_items import PRICE_TIERS, DemoItems, draw_items

NUM_CUSTOMERS = 3000
MIN_PURCHASES, MAX_PURCHASES = 5, 40
STOP_CHANCE = 0.165
"""Chance that a customer with at least MIN_PURCHASES purchases stops there, which makes about ten on average."""

FOLLOWS_LAST, FOLLOWS_BEFORE = 0.58, 0.1
"""Share of purchases that continue the last purchase, and the one before it; the rest goes by taste alone."""

NEXT_IN_ORDER, NEXT_BUT_ONE, OWN_HABIT = 0.5, 0.25, 0.25
"""Which type of the department continues a type: the next in buying order, the one after it, or a third."""

FOLLOW_POPULARITY = 0.8
"""Power of a type's popularity by which it is the more likely to continue another."""

FAVOURITE_DEPARTMENTS, OTHER_DEPARTMENT = (5.0, 3.0, 2.0), 0.4
"""Weights of a customer's first, second and third department, and of each of the others."""

SAME_LINE, FAVOURITE_BRAND, USUAL_TIER = 2.0, 2.0, 1.5
"""How many times the appeal of an item grows by being of the last purchases' line, favourite brand, usual tier."""

TYPE_OWNED = 0.2
"""How much less likely a type is that the customer owns already."""

DEPARTMENT_EXPONENT, BRAND_EXPONENT, TYPE_EXPONENT, BEST_SELLER_EXPONENT = 1.1, 1.0, 1.6, 1.4
"""Popularity of departments, of brands and types within a department, of items within a type: rank to minus this."""

SECONDS_PER_DAY = 86_400
FIRST_SECOND = 1_672_531_200  # 2023-01-01
NUM_DAYS = 730
LATE_DAYS = (705, 725)
"""Late items go on sale between these days."""


@dataclass(frozen=True, eq=False)
class Customers:
    """Lasting traits of the customers, and when they buy.

    Attributes:
        keys: the customers' ids.
        departments: [U, departments] weights of the taste in departments.
        brands: [U, departments] favourite brand.
        tiers: [U] usual price tier.
        num_purchases: [U].
        times: [U, MAX_PURCHASES] seconds of the purchases, rising; only the first num_purchases count.
    """

    keys: list[str]
    departments: np.ndarray
    brands: np.ndarray
    tiers: np.ndarray
    num_purchases: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


class DemoWorld:
    """The demo shop of one seed: items, customers, the law of the next purchase, and the purchases made.

    The same seed gives the same world on every machine.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.items = draw_items(rng)
        self.customers = _draw_customers(self.items, rng)
        type_popularity = _draw_type_popularity(self.items, rng)
        self._follow = _draw_follow_ups(self.items, type_popularity, rng)
        self._type_tastes = _type_tastes(self.items, self.customers, type_popularity)
        self._appeal = _draw_popularity(self.items, rng) * _personal_appeal(self.items, self.customers)
        self._on_sale_from = _draw_launches(self.items, rng)
        self._purchase_seed = int(rng.integers(2**32))

    @cached_property
    def purchases(self) -> np.ndarray:
        """[U, MAX_PURCHASES] int64 items in the order bought, -1 after the customer's last purchase."""
        rng = np.random.default_rng(self._purchase_seed)
        luck = rng.random((len(self.customers), MAX_PURCHASES))
        bought = np.full((len(self.customers), MAX_PURCHASES), -1, dtype=np.int64)
        for step in range(MAX_PURCHASES):
            buyers = np.flatnonzero(self.customers.num_purchases > step)
            chance = self.next_purchase(buyers, bought[buyers, :step], self.customers.times[buyers, step])
            bought[buyers, step] = _draw(chance, luck[buyers, step])
        return bought

    def next_purchase(self, users: np.ndarray, bought: np.ndarray, times: np.ndarray) -> np.ndarray:
        """True probability of every item to be a customer's next purchase.

        Args:
            users: [B] customers.
            bought: [B, S] items that each has bought so far, oldest first, filled at the end with -1.
            times: [B] seconds of the next purchase; what is not on sale by then has probability 0.

        Returns:
            [B, N] float64, rows summing to one.
        """
        last, before = _last_two(bought)
        owned = np.zeros((len(users), len(self.items) + 1), dtype=bool)  # the last column takes the -1s
        np.put_along_axis(owned, bought, True, axis=1)
        owned = owned[:, :-1]
        appeal = self._appeal[users] * np.where(self._same_line(last) | self._same_line(before), SAME_LINE, 1.0)
        appeal = np.where(owned | (self._on_sale_from > times[:, None]), 0.0, appeal)
        starts = self.items.type_starts
        type_chance = self._type_chance(users, last, before)
        type_chance = type_chance * np.where(np.logical_or.reduceat(owned, starts, axis=1), TYPE_OWNED, 1.0)
        type_appeal = np.add.reduceat(appeal, starts, axis=1)
        per_appeal = np.divide(type_chance, type_appeal, out=np.zeros_like(type_appeal), where=type_appeal > 0)
        chance = appeal * per_appeal[:, self.items.types]
        return chance / chance.sum(axis=1, keepdims=True)

    def _type_chance(self, users: np.ndarray, last: np.ndarray, before: np.ndarray) -> np.ndarray:
        """[B, types] probability of the next product type, before ownership counts."""
        after_last = np.where(last >= 0, FOLLOWS_LAST, 0.0)[:, None]
        after_before = np.where(before >= 0, FOLLOWS_BEFORE, 0.0)[:, None]
        return (
            after_last * self._follow[self.items.types[last]]
            + after_before * self._follow[self.items.types[before]]
            + (1.0 - after_last - after_before) * self._type_tastes[users]
        )

    def _same_line(self, item: np.ndarray) -> np.ndarray:
        """[B, N] whether an item is of the same brand's line as item[b]; false where item[b] is -1."""
        line = self.items.departments * 100 + self.items.lines
        return (line[None, :] == line[item][:, None]) & (item >= 0)[:, None]


def _last_two(bought: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last item and the one before it of every row of [B, S], -1 where there is none."""
    num_bought = (bought >= 0).sum(axis=1)
    padded = np.concatenate([np.full((len(bought), 2), -1), bought], axis=1)
    rows = np.arange(len(bought))
    return padded[rows, num_bought + 1], padded[rows, num_bought]


def _draw(chance: np.ndarray, luck: np.ndarray) -> np.ndarray:
    """One column per row of [B, N] chances, by inverting the cumulative chance at luck in [0, 1)."""
    cumulative = chance.cumsum(axis=1)
    return (cumulative <= (luck * cumulative[:, -1])[:, None]).sum(axis=1)


def _draw_customers(items: DemoItems, rng: np.random.Generator) -> Customers:
    num_departments, num_brands = items.departments[-1] + 1, items.brands.max() + 1
    favourites = _draw_orders(_popularity(num_departments, DEPARTMENT_EXPONENT, rng), NUM_CUSTOMERS, rng)
    brands = [
        _draw_orders(_popularity(num_brands, BRAND_EXPONENT, rng), NUM_CUSTOMERS, rng)[:, 0]
        for _ in range(num_departments)
    ]
    tastes = np.full((NUM_CUSTOMERS, num_departments), OTHER_DEPARTMENT)
    for place, weight in enumerate(FAVOURITE_DEPARTMENTS):
        tastes[np.arange(NUM_CUSTOMERS), favourites[:, place]] = weight
    num_purchases = np.minimum(MIN_PURCHASES - 1 + rng.geometric(STOP_CHANCE, NUM_CUSTOMERS), MAX_PURCHASES)
    return Customers(
        keys=[f"customer-{number:05x}" for number in rng.permutation(16**5)[:NUM_CUSTOMERS].tolist()],
        departments=tastes / tastes.sum(axis=1, keepdims=True),
        brands=np.stack(brands, axis=1),
        tiers=rng.integers(len(PRICE_TIERS), size=NUM_CUSTOMERS),
        num_purchases=num_purchases,
        times=_draw_times(num_purchases, rng),
    )


def _popularity(count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """[count] weights that fall with a power of a random rank."""
    return (1.0 + rng.permutation(count)) ** -exponent


def _draw_orders(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, choices] orders of preference; a choice comes first with probability in proportion to its weight."""
    return np.argsort(rng.exponential(size=(count, len(weights))) / weights, axis=1)


def _draw_times(num_purchases: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[U, MAX_PURCHASES] seconds: last purchases fall in the last five months, gaps vary around a customer's pace."""
    num_users = len(num_purchases)
    last_day = NUM_DAYS - 150 * rng.random(num_users)
    pace = 4 + 10 * rng.random(num_users)
    days = np.cumsum(pace[:, None] * (0.2 + 1.6 * rng.random((num_users, MAX_PURCHASES))), axis=1)
    days += (last_day - days[np.arange(num_users), num_purchases - 1])[:, None]
    return FIRST_SECOND + (days * SECONDS_PER_DAY).astype(np.int64)


def _draw_type_popularity(items: DemoItems, rng: np.random.Generator) -> np.ndarray:
    """[types] popularity within the department."""
    type_departments = items.departments[items.type_starts]
    members = np.split(type_departments, np.flatnonzero(np.diff(type_departments)) + 1)
    return np.concatenate([_popularity(len(types), TYPE_EXPONENT, rng) for types in members])


def _draw_follow_ups(items: DemoItems, type_popularity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[types, types] probability that a type is continued by another; rows sum to one."""
    type_departments = items.departments[items.type_starts]
    follow = np.zeros((len(type_departments), len(type_departments)))
    for department in range(type_departments[-1] + 1):
        types = np.flatnonzero(type_departments == department)
        for place, current in enumerate(types):
            ahead = np.roll(types, -place)[1:]
            habit = ahead[2 + rng.integers(len(ahead) - 2)]
            follow[current, [ahead[0], ahead[1], habit]] = NEXT_IN_ORDER, NEXT_BUT_ONE, OWN_HABIT
    follow = follow * type_popularity**FOLLOW_POPULARITY
    return follow / follow.sum(axis=1, keepdims=True)


def _type_tastes(items: DemoItems, customers: Customers, type_popularity: np.ndarray) -> np.ndarray:
    """[U, types] probability of a type by taste alone: the department's weight times the type's popularity in it."""
    tastes = customers.departments[:, items.departments[items.type_starts]] * type_popularity
    return tastes / tastes.sum(axis=1, keepdims=True)


def _draw_popularity(items: DemoItems, rng: np.random.Generator) -> np.ndarray:
    """[N] popularity within the type: best sellers first, by a power of a random rank; late items are best sellers."""
    members = np.split(np.arange(len(items)), items.type_starts[1:])
    popularity = np.concatenate([_popularity(len(of_type), BEST_SELLER_EXPONENT, rng) for of_type in members])
    return np.where(items.late, 1.0, popularity)


def _personal_appeal(items: DemoItems, customers: Customers) -> np.ndarray:
    """[U, N] how much a customer's favourite brand and usual price tier raise an item's appeal."""
    favourite = customers.brands[:, items.departments] == items.brands
    usual = customers.tiers[:, None] == items.tiers
    return np.where(favourite, FAVOURITE_BRAND, 1.0) * np.where(usual, USUAL_TIER, 1.0)


def _draw_launches(items: DemoItems, rng: np.random.Generator) -> np.ndarray:
    """[N] seconds from which an item is on sale; 0 for all but the late items."""
    days = LATE_DAYS[0] + (LATE_DAYS[1] - LATE_DAYS[0]) * rng.random(len(items))
    return np.where(items.late, FIRST_SECOND + (days * SECONDS_PER_DAY).astype(np.int64), 0)
