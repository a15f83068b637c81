//! Strongly connected components, by Tarjan, without recursion: histories are long.

use std::collections::{BTreeMap, BTreeSet};

/// Every set of nodes that reach each other, sorted; single nodes do not count.
pub(crate) fn cycles(edges: &BTreeMap<u64, BTreeSet<u64>>) -> Vec<Vec<u64>> {
    let none = BTreeSet::new();
    let mut number: BTreeMap<u64, usize> = BTreeMap::new();
    let mut low: BTreeMap<u64, usize> = BTreeMap::new();
    let mut stack: Vec<u64> = Vec::new();
    let mut on_stack: BTreeSet<u64> = BTreeSet::new();
    let mut found = Vec::new();
    for root in edges.keys() {
        if number.contains_key(root) {
            continue;
        }
        let mut work = vec![(*root, edges.get(root).unwrap_or(&none).iter())];
        number.insert(*root, number.len());
        low.insert(*root, number.len() - 1);
        stack.push(*root);
        on_stack.insert(*root);
        while let Some((node, next)) = work.last_mut() {
            let node = *node;
            if let Some(child) = next.next() {
                if !number.contains_key(child) {
                    let count = number.len();
                    number.insert(*child, count);
                    low.insert(*child, count);
                    stack.push(*child);
                    on_stack.insert(*child);
                    work.push((*child, edges.get(child).unwrap_or(&none).iter()));
                } else if on_stack.contains(child) {
                    low.insert(node, low[&node].min(number[child]));
                }
                continue;
            }
            work.pop();
            if let Some((parent, _)) = work.last() {
                low.insert(*parent, low[parent].min(low[&node]));
            }
            if low[&node] == number[&node] {
                let mut component = Vec::new();
                while let Some(member) = stack.pop() {
                    on_stack.remove(&member);
                    component.push(member);
                    if member == node {
                        break;
                    }
                }
                if component.len() > 1 {
                    component.sort_unstable();
                    found.push(component);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_are_found_and_lines_are_not() {
        let graph = |pairs: &[(u64, u64)]| {
            let mut edges: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
            pairs.iter().for_each(|(a, b)| {
                edges.entry(*a).or_default().insert(*b);
            });
            cycles(&edges)
        };
        assert!(graph(&[(1, 2), (2, 3), (1, 3)]).is_empty());
        assert_eq!(graph(&[(1, 2), (2, 1)]), [vec![1, 2]]);
        assert_eq!(graph(&[(1, 2), (2, 3), (3, 1), (3, 4), (5, 6), (6, 5)]), [vec![1, 2, 3], vec![5, 6]]);
        let line: Vec<_> = (0..100_000).map(|n| (n, n + 1)).collect();
        assert!(graph(&line).is_empty());
    }
}
