"""Leaf classification: 99 plant species from measurements of a leaf.

Split, files and grader are MLE-bench's, to the byte.
"""
import numpy as np
import pandas as pd

from tasks import (
    Task, copy_raw_folder, jpeg, log_loss, paired, raw_csv, share_of_test, split_positions, split_rows, table_1,
    write_csv, write_zip)

FEATURES = [f"{group}{i}" for group in ("margin", "shape", "texture") for i in range(1, 65)]


def prepare(raw, public, private, variant):
    """990 labelled rows become 891 to train on and 99 to test on; the publisher's own unlabelled rows are left out."""
    rows = raw_csv(raw, "train.csv", ["id", "species"])
    train, test = split_rows(rows, 0.1)
    species = sorted(rows["species"].unique())
    sample = pd.DataFrame({"id": test["id"], **{name: 1 / len(species) for name in species}})
    answers = pd.DataFrame({"id": test["id"], **{name: (test["species"] == name).astype(int) for name in species}})
    write_csv(train, public / "train.csv")
    write_csv(test.drop(columns="species"), public / "test.csv")
    write_csv(sample, public / "sample_submission.csv")
    write_csv(answers, private / "test.csv")
    copy_raw_folder(raw, "images", public / "images", [f"{id}.jpg" for id in rows["id"]])


def score(answers, submission):
    species = [name for name in answers if name != "id"]
    return log_loss(*paired(answers, submission, "id", species, extra=False, low=0, high=1, sum_to_one=True))


def miniature(raw, seed):
    """8 labelled leaves of each species, of which 4 or 5 are to learn from, and 99 unlabelled ones.

    A species has an outline (six harmonics) and a histogram each of its margin and its texture. A leaf varies all
    three and is turned a little, which shifts its 64 shape values. The images show the same outlines.
    """
    rng = np.random.default_rng(seed)
    num_species, angle = len(SPECIES), np.arange(64) * np.pi / 32
    waves = rng.normal(0, 1, (num_species, 6, 2)) * 0.16 / np.arange(1, 7)[:, None] ** 0.5  # (species, wave, cos / sin)
    margins, textures = rng.normal(0, 1.0, (num_species, 64)), rng.normal(0, 1.0, (num_species, 64))
    num_labelled = 8 * num_species
    label = np.empty(num_labelled + 99, int)
    train, test = split_positions(num_labelled, share_of_test(0.1, num_labelled))
    label[test] = rng.permutation(np.arange(len(test)) % num_species)       # every species is on both sides
    num_left = 8 - np.bincount(label[test], minlength=num_species)
    label[train] = rng.permutation(np.repeat(np.arange(num_species), num_left))
    label[num_labelled:] = rng.integers(0, num_species, 99)
    ids = rng.permutation(len(label)) + 1
    ids = np.concatenate([np.sort(ids[:-99]), np.sort(ids[-99:])])
    rows, images = [], {}
    for id, k in zip(ids, label):
        wave = waves[k] + rng.normal(0, 0.045, (6, 2))
        turned = angle + rng.normal(0, 0.25)
        phase = np.arange(1, 7)[:, None] * turned                  # (harmonic, angle)
        radius = np.maximum(0.1, 1 + wave[:, 0] @ np.cos(phase) + wave[:, 1] @ np.sin(phase))
        shape = (radius / radius.sum() * rng.normal(0.04, 0.005)).round(8)
        margin = _histogram(rng, margins[k] + rng.normal(0, 1.0, 64), 512)
        texture = _histogram(rng, textures[k] + rng.normal(0, 1.0, 64), 1024)
        rows.append([id, SPECIES[k], *margin, *shape, *texture])
        images[f"images/{id}.jpg"] = jpeg(_silhouette(radius), size=4096)
    frame = pd.DataFrame(rows, columns=["id", "species", *FEATURES])
    train, test = frame[:-99], frame[-99:].drop(columns="species")
    sample = pd.DataFrame({"id": test["id"], **{name: 1 / num_species for name in SPECIES}})
    for name, table in (("train", train), ("test", test), ("sample_submission", sample)):
        write_csv(table, raw / f"{name}.csv.zip")
    write_zip(raw / "images.zip", images)


def _histogram(rng, logits, count):
    """64 shares of `count` draws, rounded to six decimals as the publisher has them."""
    weights = np.exp(logits)
    return (rng.multinomial(count, weights / weights.sum()) / count).round(6)


def _silhouette(radius, side=48):
    """Black leaf on white, uint8 (side, side), from 64 distances around its centre."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    edge = np.interp(np.arctan2(y, x) % (2 * np.pi), np.arange(65) * np.pi / 32, [*radius, radius[0]]) * 0.24
    return (255 * np.clip(side * (np.hypot(x, y) - edge) + 0.5, 0, 1)).astype(np.uint8)


SPECIES = """Acer_Capillipes Acer_Circinatum Acer_Mono Acer_Opalus Acer_Palmatum Acer_Pictum Acer_Platanoids Acer_Rubrum
Acer_Rufinerve Acer_Saccharinum Alnus_Cordata Alnus_Maximowiczii Alnus_Rubra Alnus_Sieboldiana Alnus_Viridis
Arundinaria_Simonii Betula_Austrosinensis Betula_Pendula Callicarpa_Bodinieri Castanea_Sativa Celtis_Koraiensis
Cercis_Siliquastrum Cornus_Chinensis Cornus_Controversa Cornus_Macrophylla Cotinus_Coggygria Crataegus_Monogyna
Cytisus_Battandieri Eucalyptus_Glaucescens Eucalyptus_Neglecta Eucalyptus_Urnigera Fagus_Sylvatica Ginkgo_Biloba
Ilex_Aquifolium Ilex_Cornuta Liquidambar_Styraciflua Liriodendron_Tulipifera Lithocarpus_Cleistocarpus
Lithocarpus_Edulis Magnolia_Heptapeta Magnolia_Salicifolia Morus_Nigra Olea_Europaea Phildelphus Populus_Adenopoda
Populus_Grandidentata Populus_Nigra Prunus_Avium Prunus_X_Shmittii Pterocarya_Stenoptera Quercus_Afares
Quercus_Agrifolia Quercus_Alnifolia Quercus_Brantii Quercus_Canariensis Quercus_Castaneifolia Quercus_Cerris
Quercus_Chrysolepis Quercus_Coccifera Quercus_Coccinea Quercus_Crassifolia Quercus_Crassipes Quercus_Dolicholepis
Quercus_Ellipsoidalis Quercus_Greggii Quercus_Hartwissiana Quercus_Ilex Quercus_Imbricaria Quercus_Infectoria_sub
Quercus_Kewensis Quercus_Nigra Quercus_Palustris Quercus_Phellos Quercus_Phillyraeoides Quercus_Pontica
Quercus_Pubescens Quercus_Pyrenaica Quercus_Rhysophylla Quercus_Rubra Quercus_Semecarpifolia Quercus_Shumardii
Quercus_Suber Quercus_Texana Quercus_Trojana Quercus_Variabilis Quercus_Vulcanica Quercus_x_Hispanica
Quercus_x_Turneri Rhododendron_x_Russellianum Salix_Fragilis Salix_Intergra Sorbus_Aria Tilia_Oliveri
Tilia_Platyphyllos Tilia_Tomentosa Ulmus_Bergmanniana Viburnum_Tinus Viburnum_x_Rhytidophylloides
Zelkova_Serrata""".split()

TASK = Task(
    id="leaf-classification", metric="log loss", direction="down",
    split="held-out", source="MLE-bench",
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv.zip and images.zip", size="40 MB",
    m_init=0.077067,
    m_best=0.0,
    m_best_miniature=0.0576,    # logistic regression on roots of the histograms and Fourier magnitudes of the outline
    published=table_1((0.0780, 0.0653), (0.0786, 0.0473), (0.0747, 0.0601),
                      (0.0785, 0.0499), (0.0761, 0.0540), (0.0689, 0.0373)),
    gold=0.0,
)
