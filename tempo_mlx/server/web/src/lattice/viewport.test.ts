import { expect, it } from 'vitest'
import { reveal } from './viewport'

it('what is chosen comes into sight, across and down', () => {
  const [here, view] = [
    { k: 1, x: 0, y: 0 },
    { width: 400, height: 300 },
  ]
  const part = (x: number, y: number) => ({ x, y, width: 60, height: 24 })
  expect(reveal(here, part(100, 100), view)).toEqual(here)
  expect(reveal(here, part(100, 600), view)).toEqual({ k: 1, x: 0, y: 300 - 8 - 624 })
  expect(reveal({ k: 1, x: -500, y: -400 }, part(100, 38), view)).toEqual({ k: 1, x: -52, y: -30 })
})
