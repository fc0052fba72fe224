/** The same cases as tests/test_listing.py: the page lists the texts that a terminal does. */

import { readFileSync } from 'node:fs'
import { expect, it } from 'vitest'
import { eachOnce } from './texts'

interface Case {
  name: string
  paths: [text: string, logprob: number][]
  listed: number[]
}

const file = new URL('../../../../../tests/texts.json', import.meta.url)
const cases = JSON.parse(readFileSync(file, 'utf8')) as Case[]

it.each(cases)('$name', ({ paths, listed }) => {
  const found = eachOnce(paths.map(([text, logprob], id) => ({ text, logprob, token_ids: [id], exact: true })))
  expect(found.map(({ index }) => index)).toEqual(listed)
})
