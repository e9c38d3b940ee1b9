"""All pictures of one eye: the photograph always, OCT and angiogram where the patient had them."""

from __future__ import annotations

from dataclasses import dataclass

from fundusfm.shards.synth.anatomy import draw_anatomy
from fundusfm.shards.synth.camera import Camera, choose_view, photograph
from fundusfm.shards.synth.ffa import paint_angiogram
from fundusfm.shards.synth.findings import EyeTruth, PatientTruth
from fundusfm.shards.synth.lesions import draw_lesions
from fundusfm.shards.synth.oct import paint_b_scan
from fundusfm.shards.synth.retina import paint_retina
from fundusfm.shards.synth.rng import Stream, generator
from fundusfm.shards.synth.vessels import grow_vessels


@dataclass(frozen=True)
class Picture:
    """One image of an eye as a JPEG; `labels` are the findings that its modality shows."""

    eye: str
    modality: str
    width: int
    height: int
    source: str
    labels: tuple[str, ...]
    jpeg: bytes


def draw_eye(seed: int, patient: PatientTruth, truth: EyeTruth, camera: Camera, size: int) -> list[Picture]:
    """The pictures of one eye, all of one anatomy; the camera is chosen without a look at the findings."""
    number, eye = patient.number, truth.eye
    anatomy = draw_anatomy(seed, number, patient.age, truth)
    vessels = grow_vessels(seed, number, eye, anatomy)
    view = choose_view(generator(seed, number, Stream.CAMERA, eye), camera, size, eye == "left")
    lesions = draw_lesions(seed, number, truth, anatomy, view)
    retina = paint_retina(generator(seed, number, Stream.TEXTURE, eye), anatomy, vessels, lesions, view)
    light, clouds = generator(seed, number, Stream.CFP, eye), generator(seed, number, Stream.CFP, eye, 1)
    jpeg = photograph(light, clouds, retina, truth, camera, view)
    pictures = [Picture(eye, "CFP", size, size, camera.name, truth.labels("CFP"), jpeg)]
    if patient.has_oct:
        jpeg = paint_b_scan(generator(seed, number, Stream.OCT, eye), truth, anatomy, size)
        pictures.append(Picture(eye, "OCT", size, size, "oct", truth.labels("OCT"), jpeg))
    if patient.has_ffa:
        jpeg = paint_angiogram(
            generator(seed, number, Stream.FFA, eye), truth, anatomy, vessels, lesions, view
        )
        pictures.append(Picture(eye, "FFA", size, size, camera.name, truth.labels("FFA"), jpeg))
    return pictures
