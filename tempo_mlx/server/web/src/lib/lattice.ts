/** The lattice as the views need it: members with their edges, the best path, and who descends from whom. */

import { endsText, isShown, type Run, type Step, type Token } from './run'

export interface Edge {
  /** index of the parent among `members` */
  member: number
  /** P(parent | child) */
  posterior: number
  /** P(child | parent) */
  forward: number
}

export interface Member {
  index: number
  step: number
  /** place in its set, 0 is the most probable */
  rank: number
  token: Token
  parents: Edge[]
  children: Edge[]
}

export class Lattice {
  readonly steps: Step[] = []
  readonly members: Member[] = []
  /** index of the first member of each step; one more entry at the end */
  readonly first: number[] = [0]
  private readonly bySlot = new Map<number, number>()
  private readonly score: number[] = []
  private readonly back: number[] = []
  /** scores of steps before this one are up to date */
  private scored = 0
  private branching = false

  static of(run: Pick<Run, 'steps'>): Lattice {
    const lattice = new Lattice()
    for (const step of run.steps) lattice.append(step)
    return lattice
  }

  get length(): number {
    return this.steps.length
  }

  append(step: Step): void {
    step.tokens.forEach((token, rank) => {
      const index = this.members.length
      const parents: Edge[] = []
      for (const [slot, posterior, forward] of token.parents) {
        const parent = this.bySlot.get(slot)
        if (parent === undefined) continue
        parents.push({ member: parent, posterior, forward })
        this.members[parent]!.children.push({ member: index, posterior, forward })
      }
      this.members.push({ index, step: this.steps.length, rank, token, parents, children: [] })
      if (token.branch !== undefined) this.branching = true
    })
    for (let index = this.first[this.steps.length]!; index < this.members.length; index++) {
      const slot = this.members[index]!.token.slot
      if (slot !== null) this.bySlot.set(slot, index)
    }
    this.steps.push(step)
    this.first.push(this.members.length)
  }

  membersOf(step: number): Member[] {
    return this.members.slice(this.first[step], this.first[step + 1])
  }

  memberAtSlot(slot: number): Member | undefined {
    const index = this.bySlot.get(slot)
    return index === undefined ? undefined : this.members[index]
  }

  /** Replace what later steps learn about a member (removal, posterior, attention). Returns its step. */
  update(slot: number, change: Partial<Token>): number | null {
    const member = this.memberAtSlot(slot)
    if (!member) return null
    Object.assign(member.token, change)
    this.scored = Math.min(this.scored, member.step)
    return member.step
  }

  /**
   * Member index for each step of the most probable path over the edges P(j|i) (Viterbi), as in report/run.py: a set
   * that shows no member takes part with all of them, and a token that ends the text can only be the last. Of
   * branches, the one with the best mean log-probability, which may end before the last step.
   */
  bestPath(): number[] {
    for (; this.scored < this.length; this.scored++) this.scoreStep(this.scored)
    let best = -1
    let bestScore = -Infinity
    const from = this.branching ? 0 : (this.first[this.length - 1] ?? 0)
    for (let index = from; index < this.members.length; index++) {
      const member = this.members[index]!
      const last = member.step === this.length - 1
      if (!last && !endsText(member.token)) continue
      const score = this.branching ? this.score[index]! / (member.step + 1) : this.score[index]!
      if (score > bestScore) {
        bestScore = score
        best = index
      }
    }
    return this.pathTo(best)
  }

  private pathTo(member: number): number[] {
    const path: number[] = []
    for (let at = member; at >= 0; at = this.back[at]!) path.push(at)
    return path.reverse()
  }

  private scoreStep(step: number): void {
    const first = this.first[step]!
    const end = this.first[step + 1]!
    let anyShown = false
    for (let index = first; index < end; index++) anyShown ||= isShown(this.members[index]!.token)
    for (let index = first; index < end; index++) {
      const { token, parents } = this.members[index]!
      this.score[index] = -Infinity
      this.back[index] = -1
      if (anyShown && !isShown(token)) continue
      if (step === 0) this.score[index] = Math.log(token.probability)
      for (const { member, forward } of parents) {
        const score = this.score[member]! + Math.log(forward)
        if (score > this.score[index]!) {
          this.score[index] = score
          this.back[index] = member
        }
      }
    }
  }

  /** The members, one a step, that spell `ids` along edges; [] where the lattice holds no such path. */
  locate(ids: readonly number[]): number[] {
    let layer = new Map<number, number>() // member -> predecessor
    const layers: Map<number, number>[] = []
    for (let step = 0; step < Math.min(ids.length, this.length); step++) {
      const next = new Map<number, number>()
      for (const member of this.membersOf(step)) {
        if (member.token.id !== ids[step]) continue
        if (step === 0) next.set(member.index, -1)
        else {
          const parent = member.parents
            .filter((edge) => layer.has(edge.member))
            .sort((a, b) => b.forward - a.forward)[0]
          if (parent) next.set(member.index, parent.member)
        }
      }
      if (next.size === 0) return []
      layers.push(next)
      layer = next
    }
    const path: number[] = []
    let at = layer.keys().next().value ?? -1
    for (let step = layers.length - 1; step >= 0 && at >= 0; step--) {
      path.push(at)
      at = layers[step]!.get(at)!
    }
    return path.reverse()
  }

  /**
   * Lineage posterior of a member: for every earlier member the probability that a path through `index` used it
   * (gamma of defaults.md, from the recorded edges alone), itself included with 1.
   */
  ancestry(index: number): Map<number, number> {
    return this.spread(index, (member) => member.parents.map((edge) => [edge.member, edge.posterior]))
  }

  /** For every later member the share of its past that runs through `index`, itself included with 1. */
  descent(index: number): Map<number, number> {
    return this.spread(index, (member) => member.children.map((edge) => [edge.member, edge.posterior]))
  }

  private spread(index: number, next: (member: Member) => [number, number][]): Map<number, number> {
    const share = new Map([[index, 1]])
    let layer = new Map(share)
    while (layer.size > 0) {
      const following = new Map<number, number>()
      for (const [member, value] of layer) {
        for (const [other, factor] of next(this.members[member]!)) {
          following.set(other, (following.get(other) ?? 0) + value * factor)
        }
      }
      for (const [member, value] of following) {
        if (value < 1e-4) following.delete(member)
        else share.set(member, value)
      }
      layer = following
    }
    return share
  }
}

/** The probability mass of a step: 1, or more where the members of different branches have distributions of their own. */
export function mass(step: Step): number {
  return step.tokens.reduce((sum, token) => sum + token.probability, Math.max(0, step.residual_probability))
}

/** Entropy in bits of a recorded set, its residual mass counted as one more outcome (so a lower bound). */
export function entropy(step: Step): number {
  const whole = mass(step)
  let bits = 0
  for (const p of [...step.tokens.map((token) => token.probability), step.residual_probability]) {
    if (p > 0) bits -= (p / whole) * Math.log2(p / whole)
  }
  return Math.max(0, bits)
}

/** Members of a step that are still there. */
export function aliveWidth(step: Step): number {
  return step.tokens.reduce((n, token) => n + (token.removed_after === null ? 1 : 0), 0)
}
