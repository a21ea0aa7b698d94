"""One page about runs and evaluations: did it get better? Read the modules in this order.

evaluations      evaluations of any task as read from their folders -> Results
collect          runs as left in their folders, in groups that differ in seeds alone, with evaluations -> Report
run_verdicts     what a group's curves say: overoptimised, a sign of it, or inconclusive, by stated rules
eval_verdicts    which model or group is better, in a sentence, and the sentence at the top of the page
side_by_side     the items on which one model did worst against another
figures          matplotlib figures as SVG text whose colours the page sets
first_screen     the table of arms and the one figure that stand at the top
sections         all of it as a Page: headline, first screen, and sections that fold
render           the Page as one HTML file, by report.html.j2
text             numbers and foreign text as the page shows them

Outsiders import collect, first_screen, sections and render. Nothing read here is trusted: folders, names and answers come from anywhere.
"""
