"""What evaluations share: settings, results in one form, answers of models, paired comparisons."""
