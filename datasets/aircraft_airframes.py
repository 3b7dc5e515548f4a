"""Dimensions of the six airliners that `aircraft_geometry` turns into meshes.

They are close to those of well-known types, which the names describe, but none is a survey of a real aircraft: what
counts is that the six shapes differ in wing position, sweep, tail and engine layout.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """One engine on the left side or on the centre line (`y` = 0): position of the centre of its intake, in metres."""

    x: float
    y: float
    z: float
    length: float
    radius: float
    propeller: float = 0.0  # radius of the disc; 0 for a jet


@dataclass(frozen=True)
class Airframe:
    """Dimensions of an aircraft in metres and degrees. `*_x` is the leading edge of a root chord on the centre line."""

    name: str
    length: float
    radius: float
    wing_x: float
    wing_z: float
    span: float
    wing_root: float
    wing_kink: tuple[float, float]  # (share of the half span, chord)
    wing_tip: float
    wing_sweep: float
    wing_dihedral: float
    winglet: float
    fin_x: float
    fin_root: float
    fin_tip: float
    fin_height: float
    fin_sweep: float
    t_tail: bool
    stabiliser_x: float
    stabiliser_z: float
    stabiliser_span: float
    stabiliser_root: float
    stabiliser_tip: float
    stabiliser_sweep: float
    engines: tuple[Engine, ...]
    upper_deck: float = 0.0  # extra height of the front third, as a share of the radius
    gear_height: float = 4.0  # from the axis of the fuselage down to the ground


# fmt: off
AIRFRAMES: dict[str, Airframe] = {
    a.name: a
    for a in (
        Airframe(
            name="twin_narrow_body",
            length=37.6, radius=2.05, wing_x=7.0, wing_z=-1.1, span=34.5, wing_root=7.4, wing_kink=(0.36, 4.3),
            wing_tip=1.7, wing_sweep=28, wing_dihedral=5.5, winglet=1.9, fin_x=-10.0, fin_root=6.4, fin_tip=2.2,
            fin_height=6.2, fin_sweep=41, t_tail=False, stabiliser_x=-13.2, stabiliser_z=0.7, stabiliser_span=12.8,
            stabiliser_root=4.0, stabiliser_tip=1.5, stabiliser_sweep=33,
            engines=(Engine(7.6, 5.75, -2.35, 4.2, 1.2),), gear_height=4.1,
        ),
        Airframe(
            name="twin_wide_body",
            length=62.0, radius=3.1, wing_x=12.5, wing_z=-1.6, span=62.0, wing_root=13.5, wing_kink=(0.34, 7.8),
            wing_tip=2.2, wing_sweep=34, wing_dihedral=7, winglet=0.0, fin_x=-17.5, fin_root=10.0, fin_tip=3.4,
            fin_height=9.6, fin_sweep=44, t_tail=False, stabiliser_x=-22.0, stabiliser_z=1.0, stabiliser_span=21.5,
            stabiliser_root=6.6, stabiliser_tip=2.2, stabiliser_sweep=37,
            engines=(Engine(12.6, 9.8, -3.3, 7.0, 2.0),), gear_height=6.3,
        ),
        Airframe(
            name="four_engine",
            length=68.0, radius=3.2, wing_x=15.0, wing_z=-1.7, span=63.0, wing_root=14.5, wing_kink=(0.38, 8.4),
            wing_tip=3.0, wing_sweep=40, wing_dihedral=7, winglet=1.9, fin_x=-19.0, fin_root=11.5, fin_tip=4.0,
            fin_height=9.8, fin_sweep=46, t_tail=False, stabiliser_x=-24.5, stabiliser_z=1.0, stabiliser_span=22.0,
            stabiliser_root=7.2, stabiliser_tip=2.4, stabiliser_sweep=40,
            engines=(Engine(12.3, 11.6, -3.1, 6.0, 1.6), Engine(3.6, 21.0, -2.3, 6.0, 1.6)),
            upper_deck=0.42, gear_height=6.2,
        ),
        Airframe(
            name="rear_engine_t_tail",
            length=39.5, radius=1.75, wing_x=2.2, wing_z=-1.05, span=28.5, wing_root=6.6, wing_kink=(0.36, 4.0),
            wing_tip=1.5, wing_sweep=26, wing_dihedral=3, winglet=0.0, fin_x=-13.0, fin_root=6.0, fin_tip=3.8,
            fin_height=5.4, fin_sweep=43, t_tail=True, stabiliser_x=0.3, stabiliser_z=0.0, stabiliser_span=11.6,
            stabiliser_root=3.4, stabiliser_tip=1.5, stabiliser_sweep=31,
            engines=(Engine(-8.6, 3.0, 0.75, 5.2, 1.05),), gear_height=3.3,
        ),
        Airframe(
            name="turboprop_high_wing",
            length=27.2, radius=1.45, wing_x=3.3, wing_z=1.35, span=27.5, wing_root=2.9, wing_kink=(0.36, 2.8),
            wing_tip=1.6, wing_sweep=3, wing_dihedral=1.5, winglet=0.0, fin_x=-8.3, fin_root=4.4, fin_tip=2.7,
            fin_height=4.9, fin_sweep=33, t_tail=True, stabiliser_x=0.2, stabiliser_z=0.0, stabiliser_span=7.8,
            stabiliser_root=2.2, stabiliser_tip=1.4, stabiliser_sweep=9,
            engines=(Engine(6.0, 4.1, 1.15, 5.2, 0.72, propeller=1.95),), gear_height=2.7,
        ),
        Airframe(
            name="trijet",
            length=58.0, radius=3.0, wing_x=10.5, wing_z=-1.7, span=51.5, wing_root=13.0, wing_kink=(0.36, 7.8),
            wing_tip=2.7, wing_sweep=37, wing_dihedral=6, winglet=2.1, fin_x=-20.0, fin_root=8.8, fin_tip=3.3,
            fin_height=9.4, fin_sweep=40, t_tail=False, stabiliser_x=-19.0, stabiliser_z=0.9, stabiliser_span=18.5,
            stabiliser_root=6.6, stabiliser_tip=2.6, stabiliser_sweep=37,
            engines=(Engine(9.8, 8.5, -3.2, 6.2, 1.6), Engine(-17.0, 0.0, 4.0, 10.5, 1.5)), gear_height=6.0,
        ),
    )
}
# fmt: on
