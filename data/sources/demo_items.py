"""The demo shop's catalogue: product types, brands and lines in words, and the items drawn from them.

The product types of a department are written in the order in which people tend to buy them (a tent, then a sleeping
bag, then a mat); `data/sources/demo_world.py` walks along that order. Nothing that an item shows (key, title, category,
brand, price, row) tells its type's place in it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# department: (brands, colours, product types), a type being (shelf, noun, usual price, variants).
_Type = tuple[str, str, int, str]
_DEPARTMENTS: dict[str, tuple[str, str, list[_Type]]] = {
    "Camping": (
        "Fernhollow, Northpine, Kestrelwood, Bramblecot, Tarnside",
        "Moss Green, Granite Grey, Burnt Orange, Sand, Lake Blue",
        [
            ("Shelter", "Tent", 180, "2-Person, 3-Person, 4-Person, Ultralight"),
            ("Sleeping", "Sleeping Bag", 90, "Down, Synthetic, 3-Season, Winter"),
            ("Sleeping", "Sleeping Mat", 50, "Inflatable, Foam, Self-Inflating, Double"),
            ("Camp Kitchen", "Camp Stove", 60, "Compact, Two-Burner, Gas, Wood"),
            ("Camp Kitchen", "Cookset", 45, "Titanium, Aluminium, 4-Piece, 7-Piece"),
            ("Camp Kitchen", "Cool Box", 70, "20 L, 35 L, Soft, Wheeled"),
            ("Light and Power", "Headlamp", 30, "200 lm, 350 lm, Rechargeable, Waterproof"),
            ("Light and Power", "Lantern", 35, "LED, Collapsible, Solar, Hanging"),
            ("Furniture", "Camp Chair", 55, "Low, High-Back, Rocking, Folding"),
            ("Furniture", "Camp Table", 65, "Roll-Top, Folding, Aluminium, Bamboo"),
            ("Shelter", "Tarp", 40, "3 x 3 m, 3 x 4 m, Hexagonal, Ripstop"),
            ("Sleeping", "Hammock", 45, "Single, Double, Mosquito-Net, Quilted"),
        ],
    ),
    "Cycling": (
        "Velmora, Spokewell, Cadenza Works, Ridgerunner, Pedalo Union",
        "Matte Black, Signal Red, Sky Blue, Olive, Reflective Silver",
        [
            ("Bikes", "City Bike", 520, "7-Speed, Single-Speed, Step-Through, Belt-Drive"),
            ("Safety", "Bike Helmet", 60, "Urban, Road, Visor, MIPS"),
            ("Safety", "Bike Lock", 45, "U, Chain, Folding, Cable"),
            ("Safety", "Bike Light Set", 35, "USB, 400 lm, 800 lm, Dynamo"),
            ("Accessories", "Bike Pump", 30, "Mini, Floor, High-Pressure, Two-Stage"),
            ("Accessories", "Repair Kit", 20, "Tubeless, Pocket, 16-Piece, Workshop"),
            ("Carrying", "Pannier Rack", 45, "Rear, Front, Steel, Aluminium"),
            ("Carrying", "Pannier Bag", 70, "20 L, 25 L, Waterproof, Canvas"),
            ("Clothing", "Cycling Gloves", 25, "Half-Finger, Winter, Gel, Mesh"),
            ("Clothing", "Rain Jacket", 90, "Packable, Breathable, High-Visibility, Commuter"),
            ("Accessories", "Bike Computer", 80, "GPS, Wired, Wireless, Colour-Screen"),
            ("Carrying", "Child Seat", 110, "Front, Rear, Reclining, Frame-Mounted"),
        ],
    ),
    "Kitchen": (
        "Hearthline, Copperleaf, Marlow & Finch, Oakmere, Saltgate",
        "Cream, Slate, Copper, Duck Egg, Charcoal",
        [
            ("Cookware", "Skillet", 45, "Cast Iron, Carbon Steel, 24 cm, 28 cm"),
            ("Cookware", "Saucepan", 40, "Stainless Steel, 1.5 L, 2.5 L, Non-Stick"),
            ("Cookware", "Dutch Oven", 95, "Enamelled, 4 L, 6 L, Oval"),
            ("Knives and Boards", "Chef's Knife", 70, "18 cm, 21 cm, Forged, Damascus"),
            ("Knives and Boards", "Cutting Board", 30, "Bamboo, Walnut, Large, End-Grain"),
            ("Knives and Boards", "Knife Sharpener", 25, "Two-Stage, Whetstone, Electric, Ceramic"),
            ("Tools", "Mixing Bowl Set", 30, "3-Piece, Glass, Steel, Nesting"),
            ("Tools", "Kitchen Scale", 25, "Digital, 5 kg, 10 kg, Glass-Top"),
            ("Appliances", "Stand Mixer", 240, "4.5 L, 6 L, Tilt-Head, Compact"),
            ("Appliances", "Hand Blender", 55, "600 W, 1000 W, Cordless, 3-in-1"),
            ("Tools", "Spice Rack", 35, "Wall-Mounted, Rotating, 12-Jar, 20-Jar"),
            ("Tools", "Apron", 20, "Linen, Canvas, Cross-Back, Children's"),
        ],
    ),
    "Coffee and Tea": (
        "Brewster Lane, Crema Nova, Kettle & Thorn, Monsoon Hill, Darkwater",
        "Ivory, Midnight, Terracotta, Sage, Brushed Steel",
        [
            ("Brewing", "Espresso Machine", 320, "Manual, Semi-Automatic, 15 bar, Dual-Boiler"),
            ("Grinding", "Coffee Grinder", 85, "Burr, Hand, Conical, Quiet"),
            ("Brewing", "Tamper", 20, "51 mm, 58 mm, Spring, Walnut"),
            ("Brewing", "Milk Frother", 35, "Handheld, Induction, Hot-and-Cold, Jug"),
            ("Cups", "Espresso Cup Set", 25, "2-Piece, 4-Piece, Double-Wall, Stoneware"),
            ("Storage", "Coffee Canister", 25, "Vacuum, 500 g, 1 kg, Glass"),
            ("Brewing", "Pour-Over Dripper", 30, "Ceramic, Glass, Size 01, Size 02"),
            ("Brewing", "Gooseneck Kettle", 60, "Stovetop, Electric, 0.8 L, Temperature-Control"),
            ("Cups", "Travel Mug", 25, "350 ml, 450 ml, Leakproof, Insulated"),
            ("Tea", "Teapot", 40, "Cast-Iron, Glass, 1 L, Porcelain"),
            ("Tea", "Tea Strainer", 12, "Fine-Mesh, Basket, Folding, Stainless"),
            ("Storage", "Tea Caddy", 18, "Tin, Bamboo, Airtight, Twin"),
        ],
    ),
    "Garden": (
        "Greenmantle, Thistledown, Loam & Larch, Rookery, Sunhatch",
        "Leaf Green, Terracotta, Anthracite, Natural, Lavender",
        [
            ("Growing", "Raised Bed", 95, "Cedar, Galvanised, 120 cm, Corner"),
            ("Growing", "Potting Soil", 18, "20 L, 40 L, Peat-Free, Seedling"),
            ("Growing", "Seed Tray", 15, "24-Cell, 40-Cell, Heated, Covered"),
            ("Hand Tools", "Trowel", 16, "Ash-Handled, Narrow, Stainless, Ergonomic"),
            ("Hand Tools", "Pruning Shears", 28, "Bypass, Anvil, Ratchet, Long-Reach"),
            ("Hand Tools", "Garden Gloves", 14, "Leather, Thorn-Proof, Bamboo, Long-Cuff"),
            ("Watering", "Watering Can", 26, "5 L, 9 L, Galvanised, Long-Spout"),
            ("Watering", "Garden Hose", 42, "15 m, 30 m, Expandable, Kink-Free"),
            ("Watering", "Sprinkler", 30, "Oscillating, Pulsating, 3-Arm, Timer"),
            ("Growing", "Compost Bin", 75, "220 L, 300 L, Tumbling, Wooden"),
            ("Growing", "Trellis", 32, "Fan, Expanding, Obelisk, Willow"),
            ("Outdoors", "Bird Feeder", 24, "Squirrel-Proof, Window, Hanging, Copper-Roof"),
        ],
    ),
    "Home Office": (
        "Deskwright, Lumenary, Quillon, Paper & Plane, Stillwater",
        "Oak, White, Graphite, Walnut, Mist",
        [
            ("Furniture", "Desk", 290, "Standing, 120 cm, 140 cm, Corner"),
            ("Furniture", "Office Chair", 230, "Mesh, High-Back, Armless, Ergonomic"),
            ("Furniture", "Footrest", 35, "Tilting, Cushioned, Adjustable, Rocking"),
            ("Screens", "Monitor", 260, "24-Inch, 27-Inch, 32-Inch, Ultrawide"),
            ("Screens", "Monitor Arm", 80, "Single, Dual, Gas-Spring, Clamp"),
            ("Input", "Keyboard", 75, "Mechanical, Compact, Wireless, Split"),
            ("Input", "Mouse", 45, "Vertical, Wireless, Trackball, Silent"),
            ("Input", "Desk Mat", 25, "Felt, Leather, Cork, Extended"),
            ("Light and Sound", "Desk Lamp", 55, "LED, Clip-On, Swing-Arm, Dimmable"),
            ("Light and Sound", "Headset", 85, "USB, Wireless, Noise-Cancelling, On-Ear"),
            ("Stationery", "Notebook", 15, "A5, Dotted, Ruled, Hardcover"),
            ("Stationery", "Fountain Pen", 38, "Fine, Medium, Piston, Starter"),
        ],
    ),
    "Photography": (
        "Aperion, Lumisol, Fieldglass, Obscura North, Halden Optics",
        "Black, Silver, Tan, Forest, Smoke",
        [
            ("Cameras", "Mirrorless Camera", 780, "24 MP, 33 MP, Compact, Weather-Sealed"),
            ("Lenses", "Prime Lens", 320, "35 mm, 50 mm, 85 mm, f/1.8"),
            ("Lenses", "Zoom Lens", 460, "16-35 mm, 24-70 mm, 70-200 mm, Travel"),
            ("Lenses", "Lens Filter", 35, "UV, Polarising, ND8, Variable-ND"),
            ("Storage", "Memory Card", 40, "64 GB, 128 GB, 256 GB, High-Speed"),
            ("Carrying", "Camera Strap", 30, "Leather, Quick-Release, Wrist, Padded"),
            ("Carrying", "Camera Bag", 85, "Sling, Backpack, Shoulder, Waterproof"),
            ("Support", "Tripod", 120, "Carbon, Aluminium, Travel, Tabletop"),
            ("Support", "Ball Head", 60, "Low-Profile, Panoramic, 36 mm, Arca"),
            ("Lighting", "Flash", 140, "Speedlight, Round-Head, Macro, Pocket"),
            ("Lighting", "Softbox", 70, "60 cm, 90 cm, Octagonal, Foldable"),
            ("Storage", "Photo Album", 28, "200-Pocket, Self-Adhesive, Linen, Square"),
        ],
    ),
    "Fitness": (
        "Ironvale, Pulsewell, Kinetra, Stride & Sage, Anvil Road",
        "Black, Coral, Teal, Slate, Lime",
        [
            ("Floor Work", "Yoga Mat", 35, "4 mm, 6 mm, Cork, Travel"),
            ("Floor Work", "Yoga Block", 15, "Cork, Foam, Pair, Bamboo"),
            ("Floor Work", "Foam Roller", 28, "Smooth, Textured, 45 cm, Vibrating"),
            ("Strength", "Resistance Bands", 22, "5-Piece, Looped, Fabric, Handled"),
            ("Strength", "Kettlebell", 48, "8 kg, 12 kg, 16 kg, Adjustable"),
            ("Strength", "Dumbbell Set", 130, "20 kg, 30 kg, Hexagonal, Adjustable"),
            ("Strength", "Weight Bench", 160, "Flat, Incline, Foldable, Compact"),
            ("Strength", "Pull-Up Bar", 42, "Doorway, Wall-Mounted, Multi-Grip, Freestanding"),
            ("Cardio", "Jump Rope", 14, "Speed, Beaded, Weighted, Cordless"),
            ("Cardio", "Running Belt", 22, "Slim, Bottle, Reflective, Two-Pocket"),
            ("Cardio", "Fitness Tracker", 95, "Slim, GPS, Heart-Rate, Swim-Proof"),
            ("Cardio", "Sports Bottle", 18, "600 ml, 750 ml, 1 L, Insulated"),
        ],
    ),
    "Pets": (
        "Wagtail & Co, Pawprint Lane, Whiskerly, Burrowbank, Tumblefur",
        "Oatmeal, Berry, Navy, Pine, Mustard",
        [
            ("Sleeping", "Dog Bed", 65, "Small, Medium, Large, Orthopaedic"),
            ("Walking", "Dog Harness", 32, "No-Pull, Small, Medium, Large"),
            ("Walking", "Dog Lead", 20, "Rope, Retractable, Leather, Double"),
            ("Walking", "Treat Pouch", 15, "Silicone, Belt, Zipped, Canvas"),
            ("Feeding", "Food Bowl", 18, "Ceramic, Slow-Feed, Steel, Raised"),
            ("Feeding", "Water Fountain", 40, "2 L, 3 L, Quiet, Ceramic"),
            ("Play", "Chew Toy", 12, "Rubber, Rope, Nylon, Squeaky"),
            ("Play", "Puzzle Feeder", 24, "Level 1, Level 2, Wooden, Rolling"),
            ("Grooming", "Grooming Brush", 16, "Slicker, De-Shedding, Bristle, Glove"),
            ("Grooming", "Pet Shampoo", 13, "Oat, Sensitive, 500 ml, Detangling"),
            ("Travel", "Pet Carrier", 48, "Soft, Rigid, Backpack, Wheeled"),
            ("Sleeping", "Pet Blanket", 22, "Fleece, Waterproof, Quilted, Sherpa"),
        ],
    ),
    "Art Studio": (
        "Ochre & Ash, Palettine, Gessoway, Inkwell Yard, Vermilio",
        "Natural, Black, Birch, White, Crimson",
        [
            ("Surfaces", "Easel", 85, "Tabletop, Field, Studio, H-Frame"),
            ("Surfaces", "Canvas Pack", 30, "30 x 40 cm, 40 x 50 cm, Linen, Cotton"),
            ("Paint", "Acrylic Paint Set", 38, "12-Colour, 24-Colour, Heavy-Body, Metallic"),
            ("Brushes", "Brush Set", 26, "6-Piece, 12-Piece, Round, Flat"),
            ("Paint", "Palette", 14, "Wooden, Glass, Stay-Wet, Disposable"),
            ("Paint", "Varnish", 17, "Gloss, Satin, Matte, Spray"),
            ("Paper", "Sketchbook", 16, "A4, A5, Spiral, Toned"),
            ("Drawing", "Pencil Set", 20, "Graphite, 12-Piece, 24-Piece, Charcoal"),
            ("Drawing", "Eraser Set", 8, "Kneaded, Vinyl, Precision, 3-Piece"),
            ("Drawing", "Ink Pens", 22, "Fineliner, Brush-Tip, 6-Piece, Archival"),
            ("Paint", "Watercolour Set", 34, "12-Pan, 24-Pan, Travel, Tube"),
            ("Paper", "Watercolour Paper", 19, "Cold-Press, Hot-Press, A4, Block"),
        ],
    ),
}
_LINES = (
    "Alder, Arbor, Beacon, Boreal, Cinder, Cobble, Comet, Delta, Drift, Ember, Fable, Fjord, Gale, Harbor, Haven, "
    "Heron, Juniper, Keystone, Lark, Meridian, Nimbus, Orchard, Pebble, Quarry, Raven, Solstice, Summit, Tempo, "
    "Umber, Vista, Willow, Zephyr"
)

LINES_PER_BRAND = 2
ITEMS_PER_TYPE = 8
NUM_LATE_ITEMS = 40
PRICE_TIERS = (0.6, 1.0, 1.8)
"""Price of a value, an ordinary and a premium brand, relative to the usual price of the product type."""


@dataclass(frozen=True, eq=False)
class DemoItems:
    """The catalogue in columns of length N, grouped by product type.

    Attributes:
        keys, titles, categories, brand_names: what a customer sees.
        prices: in dollars.
        types: [N] product type, ascending; types are numbered in buying order within a department.
        departments: [N] department.
        brands: [N] brand, 0..4 within its department.
        lines: [N] product line, 0..9 within its department; line // 2 is the brand.
        tiers: [N] index into PRICE_TIERS.
        late: [N] bool, one of the few items launched shortly before the data ends.
    """

    keys: list[str]
    titles: list[str]
    categories: list[str]
    brand_names: list[str]
    prices: np.ndarray
    types: np.ndarray
    departments: np.ndarray
    brands: np.ndarray
    lines: np.ndarray
    tiers: np.ndarray
    late: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def type_starts(self) -> np.ndarray:
        """[number of types] first item of each product type."""
        return np.searchsorted(self.types, np.arange(self.types[-1] + 1))


class _Item(NamedTuple):
    """One row of DemoItems, but for the key."""

    title: str
    category: str
    brand_name: str
    price: float
    type: int
    department: int
    brand: int
    line: int
    tier: int
    late: bool


def draw_items(rng: np.random.Generator) -> DemoItems:
    """About 1,000 items: a few lines' versions of every product type, and some more that launch late."""
    num_types = sum(len(types) for _, _, types in _DEPARTMENTS.values())
    num_versions = np.full(num_types, ITEMS_PER_TYPE)
    num_versions[rng.permutation(num_types)[:NUM_LATE_ITEMS]] += 1
    rows: list[_Item] = []
    next_type = 0
    for number, name in enumerate(_DEPARTMENTS):
        department = _Department(number, name, rng)
        for product in _DEPARTMENTS[name][2]:
            rows.extend(department.draw_versions(product, next_type, num_versions[next_type], rng))
            next_type += 1
    return DemoItems(
        keys=[f"demo-{number:05x}" for number in rng.permutation(16**5)[: len(rows)].tolist()],
        titles=[row.title for row in rows],
        categories=[row.category for row in rows],
        brand_names=[row.brand_name for row in rows],
        prices=np.array([row.price for row in rows]),
        types=np.array([row.type for row in rows]),
        departments=np.array([row.department for row in rows]),
        brands=np.array([row.brand for row in rows]),
        lines=np.array([row.line for row in rows]),
        tiers=np.array([row.tier for row in rows]),
        late=np.array([row.late for row in rows]),
    )


class _Department:
    """One department's brands with their lines and price tiers."""

    def __init__(self, number: int, name: str, rng: np.random.Generator) -> None:
        self.number = number
        self.name = name
        self.brands, self.colours = (words.split(", ") for words in _DEPARTMENTS[name][:2])
        lines = _LINES.split(", ")
        self.lines = [lines[place] for place in rng.permutation(len(lines))[: LINES_PER_BRAND * len(self.brands)]]
        self.tiers = rng.permutation(np.arange(len(self.brands)) % len(PRICE_TIERS)).tolist()

    def draw_versions(self, product: _Type, type_number: int, count: int, rng: np.random.Generator) -> list[_Item]:
        """`count` items of one product type, each of another line; those beyond ITEMS_PER_TYPE launch late."""
        shelf, noun, usual_price, variants = product
        versions = []
        for place, line in enumerate(rng.permutation(len(self.lines))[:count].tolist()):
            brand = line // LINES_PER_BRAND
            variant = variants.split(", ")[rng.integers(4)]
            colour = self.colours[rng.integers(len(self.colours))]
            versions.append(
                _Item(
                    title=f"{self.brands[brand]} {self.lines[line]} {variant} {noun}, {colour}",
                    category=f"{self.name} > {shelf} > {noun}",
                    brand_name=self.brands[brand],
                    price=int(usual_price * PRICE_TIERS[self.tiers[brand]] * (0.85 + 0.3 * rng.random())) + 0.99,
                    type=type_number,
                    department=self.number,
                    brand=brand,
                    line=line,
                    tier=self.tiers[brand],
                    late=place >= ITEMS_PER_TYPE,
                )
            )
        return versions
