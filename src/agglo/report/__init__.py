"""Reports: self-contained HTML pages of eval results and of training runs, and pictures of spatial features."""
