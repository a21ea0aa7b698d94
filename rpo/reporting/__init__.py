"""One page about runs and evaluations: did it get better? Read the modules in this order.

collect          runs in groups that differ in seeds alone, with evaluations -> Report
run_verdicts     what a group's curves say: overoptimised, a sign of it, or inconclusive, by stated rules
eval_verdicts    which model or group is better, in a sentence, and the sentence at the top of the page
side_by_side     the items on which one model did worst against another
figures          matplotlib figures as SVG text whose colours the page sets
tables           arms for the first screen, runs, evaluations, versions
sections         all of it as one page
render           the page as one HTML file; report.html.j2 lays it out and states the rules

Outsiders import collect, sections, tables and render. Nothing read here is trusted: folders, names and answers come from
anywhere.
"""
