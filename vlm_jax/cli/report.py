"""Writes one HTML file that shows a run: curves, evaluations with intervals, the token budget, a
packed row with its mask, samples with their controls, config, versions and licences.

The file needs nothing but itself: no script, no network. What a run does not have yet is said in a
sentence.
"""

import argparse

SUMMARY = "one HTML file that shows a run"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--out", metavar="FILE.html",
                      help="where to write it (default: report.html in the run directory)")
  parser.add_argument("--root", help="prepared data, if it is not where the run's config says")
  parser.add_argument("--attention-maps", type=int, default=2, metavar="N",
                      help="samples of each evaluation whose attention over the picture is drawn, "
                           "word by word, from its checkpoint (2; 0 reads none)")
  parser.add_argument("--allow-outside", action="store_true",
                      help="let the frozen config name modules outside vlm_jax; they run code")


def run(args: argparse.Namespace) -> None:
  """Writes it and says where it is."""
  from vlm_jax.report import page

  path = page.write(args.workdir, args.out, root=args.root, outside=args.allow_outside,
                    maps=args.attention_maps)
  print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB; open it in any browser")
