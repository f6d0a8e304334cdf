"""SMILES without a chemistry toolkit: their symbols, the graph they write down, and whether a molecule can be that.

`fault` checks the grammar, the valences of the elements that organic chemistry is made of, and that aromatic atoms lie
in rings and can be given alternating double bonds. It knows nothing of stereochemistry, strain or stability, nor of the
valences of other elements; a toolkit may still reject what passes here. Source: the OpenSMILES specification.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["DESCRIPTORS", "Atom", "Molecule", "descriptors_of", "fault", "molecule_of", "quality", "symbols_of"]

DESCRIPTORS = (
    "heavy atoms", "carbons", "nitrogens", "oxygens", "halogens", "sulphur and phosphorus", "aromatic atoms", "rings",
    "double and triple bonds", "branchings",
)  # fmt: skip

_SYMBOL = re.compile(r"\[[^\[\]]*\]|Br|Cl|%\d\d|.", re.DOTALL)
_BRACKET = re.compile(r"\[(\d+)?([A-Z][a-z]?|[bcnops]|se|as|te)(@{1,2}|@[A-Z]{2}\d+)?(H\d*)?([+-]+\d*)?(:\d+)?\]")
_BONDS = {"-": 1.0, "=": 2.0, "#": 3.0, "$": 4.0, ":": 1.5, "/": 1.0, "\\": 1.0}
_AROMATIC = frozenset("bcnops") | {"se", "as", "te"}
# The valences of neighbours in a row of the periodic table: a charge of +1 makes an atom like the one before it.
_ROWS = (
    (("B", (3,)), ("C", (4,)), ("N", (3,)), ("O", (2,)), ("F", (1,)), ("Ne", (0,))),
    (("Al", (3,)), ("Si", (4,)), ("P", (3, 5, 7)), ("S", (2, 4, 6)), ("Cl", (1,)), ("Ar", (0,))),
    (("Ga", (3,)), ("Ge", (4,)), ("As", (3, 5, 7)), ("Se", (2, 4, 6)), ("Br", (1,)), ("Kr", (0,))),
    (("In", (3,)), ("Sn", (4,)), ("Sb", (3, 5, 7)), ("Te", (2, 4, 6)), ("I", (1, 3, 5)), ("Xe", (0,))),
)
_PLACE = {element: (row, column) for row in _ROWS for column, (element, _) in enumerate(row)}


def symbols_of(smiles: str) -> list[str]:
    """The symbols of a SMILES: bracketed atoms, Br, Cl, ring closures of two digits, single characters."""
    return _SYMBOL.findall(smiles)


@dataclass(frozen=True)
class Atom:
    element: str
    aromatic: bool = False
    charge: int = 0
    hydrogens: int | None = None  # None: as many as the valence leaves


@dataclass
class Molecule:
    """A graph: bonds are (first atom, second atom, order), order 1.5 between aromatic neighbours."""

    atoms: list[Atom] = field(default_factory=list)
    bonds: dict[tuple[int, int], float] = field(default_factory=dict)
    branchings: int = 0

    def neighbours(self) -> list[dict[int, float]]:
        found: list[dict[int, float]] = [{} for _ in self.atoms]
        for (a, b), order in self.bonds.items():
            found[a][b] = found[b][a] = order
        return found


def _atom(symbol: str) -> Atom | None:
    if symbol in ("B", "C", "N", "O", "P", "S", "F", "Cl", "Br", "I"):
        return Atom(symbol)
    if symbol in ("b", "c", "n", "o", "p", "s"):
        return Atom(symbol.upper(), aromatic=True)
    if symbol == "*":
        return Atom("*")
    if not symbol.startswith("["):
        return None
    inside = _BRACKET.fullmatch(symbol)
    if inside is None:
        raise ValueError(f"{symbol} is not an atom")
    element, hydrogens, charge = inside[2], inside[4], inside[5] or ""
    size = int(charge.lstrip("+-") or len(charge)) if charge else 0
    return Atom(
        element.capitalize(),
        aromatic=element in _AROMATIC,
        charge=-size if charge.startswith("-") else size,
        hydrogens=int(hydrogens[1:] or 1) if hydrogens else 0,
    )


def molecule_of(smiles: str) -> Molecule:
    """The graph that a SMILES writes down; ValueError says which rule of the grammar it breaks."""
    found, at, bond = Molecule(), None, None  # what was read, the atom to bind to and the bond that waits
    branches: list[int | None] = []
    open_rings: dict[str, tuple[int, str | None]] = {}
    fresh = False  # right behind an opening bracket

    def bind(a: int, b: int, symbol: str | None) -> None:
        pair = (min(a, b), max(a, b))
        if a == b or pair in found.bonds:
            raise ValueError(f"atoms {pair[0]} and {pair[1]} are bound to each other twice")
        both = found.atoms[a].aromatic and found.atoms[b].aromatic
        plain = symbol in (None, "/", "\\")  # the last two say on which side something lies, not what binds
        found.bonds[pair] = (1.5 if both else 1.0) if plain else _BONDS[symbol]

    for symbol in symbols_of(smiles.replace("\\\\", "\\")):  # many tables have it doubled
        atom = _atom(symbol)
        if atom is not None:
            found.atoms.append(atom)
            if at is not None:
                bind(at, len(found.atoms) - 1, bond)
            elif bond is not None:
                raise ValueError(f"the bond {bond} has no atom before it")
            at, bond, fresh = len(found.atoms) - 1, None, False
        elif symbol in _BONDS:
            if bond is not None or at is None:
                raise ValueError(f"the bond {symbol} has no atom before it")
            bond, fresh = symbol, False
        elif symbol.isdigit() or symbol.startswith("%"):
            if at is None or fresh:
                raise ValueError(f"the ring {symbol} has no atom before it")
            number = symbol.lstrip("%").lstrip("0") or "0"
            if number in open_rings:
                other, earlier = open_rings.pop(number)
                if bond and earlier and _BONDS[bond] != _BONDS[earlier]:
                    raise ValueError(f"the ring {number} has two different bonds")
                bind(other, at, bond or earlier)
            else:
                open_rings[number] = at, bond
            bond = None
        elif symbol == "(":
            if at is None or bond is not None or fresh:
                raise ValueError("a branch has no atom before it")
            branches.append(at)
            found.branchings, fresh = found.branchings + 1, True
        elif symbol == ")":
            if not branches or bond is not None or fresh:
                raise ValueError("a branch is empty or was never opened")
            at = branches.pop()
        elif symbol == ".":
            if at is None or bond is not None or fresh:
                raise ValueError("a dot has no molecule before it")
            at = None
        else:
            raise ValueError(f"{symbol} is not a symbol")
    if bond is not None or branches or open_rings or at is None:
        raise ValueError("it ends within a bond, a branch or a ring, or has no atom")
    return found


def _valences(atom: Atom) -> tuple[int, ...] | None:
    """The valences that an atom of this charge can have; None: not known."""
    if atom.element not in _PLACE:
        return (1,) if atom.element == "H" and atom.charge == 0 else None
    row, column = _PLACE[atom.element]
    column -= atom.charge
    return row[column][1] if 0 <= column < len(row) else None


def _connected(neighbours: list[dict[int, float]], a: int, b: int) -> bool:
    """Whether a ring runs through the bond of a and b."""
    seen, edge = {a}, [n for n in neighbours[a] if n != b]
    while edge:
        node = edge.pop()
        if node == b:
            return True
        if node not in seen:
            seen.add(node)
            edge.extend(neighbours[node])
    return False


def _pairs_up(wanting: set[int], partners: dict[int, set[int]]) -> bool:
    """Whether all atoms that want a double bond can have one, each with one partner."""
    if not wanting:
        return True
    # The atom with the fewest choices first: rings then fall into place without trying.
    atom = min(wanting, key=lambda a: len(partners[a] & wanting))
    return any(_pairs_up(wanting - {atom, other}, partners) for other in partners[atom] & wanting)


def fault(smiles: str) -> str | None:
    """Why this is not the SMILES of a molecule, or None: see the module's text for what is checked."""
    try:
        molecule = molecule_of(smiles)
    except ValueError as error:
        return str(error)
    neighbours, wanting = molecule.neighbours(), set()
    partners: dict[int, set[int]] = {}
    for i, atom in enumerate(molecule.atoms):
        soft = {n for n, order in neighbours[i].items() if order == 1.5 and _connected(neighbours, i, n)}
        # A bond to a metal is given by one of its atoms and takes nothing from the other's valence.
        bonds = [order for n, order in neighbours[i].items() if molecule.atoms[n].element in (*_PLACE, "H", "*")]
        used = sum(1 if order == 1.5 else order for order in bonds) + (atom.hydrogens or 0)
        partners[i] = soft
        if atom.aromatic and len(soft) < 2:
            return f"the aromatic atom {i} is in no ring"
        valences = _valences(atom)
        if valences is None:
            continue
        doubly = {molecule.atoms[n].element for n, order in neighbours[i].items() if order in (2, 3)}
        if atom.element == "N" and atom.charge == 0 and used == 5 and doubly & {"N", "O"}:
            continue  # the usual way to write a nitro group or an azide
        if used > valences[-1]:
            return f"{atom.element} {i} has {used:g} bonds"
        free = next(v for v in valences if v >= used) - used
        if atom.aromatic and free and atom.element != "B":
            wanting.add(i)
    return None if _pairs_up(wanting, partners) else "its aromatic rings cannot have alternating double bonds"


def descriptors_of(smiles: str) -> list[int]:
    """The counts of `DESCRIPTORS`; ValueError where the grammar is broken."""
    molecule = molecule_of(smiles)
    heavy = [atom for atom in molecule.atoms if atom.element != "H"]
    count = [atom.element for atom in heavy].count
    parent = list(range(len(molecule.atoms)))

    def root(a: int) -> int:
        while parent[a] != a:
            a = parent[a]
        return a

    rings = 0
    for a, b in molecule.bonds:
        first, second = root(a), root(b)
        rings += first == second
        parent[first] = second
    return [
        len(heavy), count("C"), count("N"), count("O"), sum(map(count, ("F", "Cl", "Br", "I"))),
        count("S") + count("P"), sum(atom.aromatic for atom in heavy), rings,
        sum(order in (2, 3) for order in molecule.bonds.values()), molecule.branchings,
    ]  # fmt: skip


def quality(samples: Iterable[str], known: Iterable[str]) -> dict[str, float]:
    """Of generated SMILES: the share that is `valid` by `fault`, of these the share of different ones (`unique`), and
    of the different ones the share that is not among the `known` (`novel`); all as strings, so that two ways to write
    one molecule count as two. Source: arXiv:1811.09621 (GuacaMol), without its canonical form."""
    samples, known = list(samples), set(known)
    valid = [s for s in samples if fault(s) is None]
    different = set(valid)
    return {
        "valid": len(valid) / max(len(samples), 1),
        "unique": len(different) / max(len(valid), 1),
        "novel": len(different - known) / max(len(different), 1),
    }
